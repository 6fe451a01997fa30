"""Models in processes that multiprocessing starts anew, as it does on Windows and macOS."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest

import ggpy

PROMPTS = ["The capital", "Once upon a time", "In the beginning"]
SPAWN = multiprocessing.get_context("spawn")
_models = []  # of a worker


def _open(stages=1):
    _models.append(ggpy.load("demo", n_ctx=128, n_threads=1, stages=stages))


def _text(prompt):
    return _models[0].generate(prompt, max_tokens=6, temperature=0).run().text


def _own_text(prompt):
    """In a process that ends with an open model."""
    _open(stages=2)
    return _text(prompt)


@pytest.fixture(scope="module")
def texts():
    with ggpy.load("demo", n_ctx=128, n_threads=1) as model:
        return [model.generate(prompt, max_tokens=6, temperature=0).run().text for prompt in PROMPTS]


def test_workers_that_are_started_anew_have_models_of_their_own(texts):
    with ProcessPoolExecutor(2, SPAWN, _open) as pool:
        assert list(pool.map(_text, PROMPTS * 2)) == texts * 2


def test_such_a_worker_may_have_stages(texts):
    with ProcessPoolExecutor(1, SPAWN) as pool:
        assert pool.submit(_own_text, PROMPTS[1]).result(120) == texts[1]


def test_a_model_is_not_sent_to_another_process():
    with ggpy.load("demo", n_ctx=128, n_threads=1) as model:
        generation = model.generate(PROMPTS[0], max_tokens=2)
        for thing, words in ((model, "open it in each process"), (generation, "a generation can't be pickled")):
            with pytest.raises(ggpy.Error, match=words):
                SPAWN.Process(target=print, args=(thing,)).start()
            with ProcessPoolExecutor(1, SPAWN) as pool, pytest.raises(ggpy.Error, match=words):
                pool.submit(print, thing).result(60)
        assert len(generation.run().ids) == 2
