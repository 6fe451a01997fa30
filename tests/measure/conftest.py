"""Small models to measure."""

from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

import ggpy
from tests.models.checkpoints import converted, random_model
from tests.models.test_llama import SIZES

TEXT = Path(__file__).parents[2] / "benchmarks" / "text.txt"


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A random Llama as f32 and as Q8_0: two paths."""
    folder = tmp_path_factory.mktemp("measure")
    model = random_model(LlamaForCausalLM, LlamaConfig(**SIZES))
    return converted(folder, model), converted(folder, model, "q8_0")


@pytest.fixture(scope="session")
def model(files):
    with ggpy.load(files[0], n_ctx=128, n_threads=2) as model:
        yield model


@pytest.fixture(scope="session")
def coarse_model(files):
    with ggpy.load(files[1], n_ctx=128, n_threads=2) as model:
        yield model
