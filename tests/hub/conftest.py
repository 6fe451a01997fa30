"""What tests of the hub share."""

import os

import pytest
from huggingface_hub import constants

from ggpy.kernels import build

from .stand_in import Hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in of the hub that huggingface_hub asks in this test, with an empty cache; and an empty cache of ggpy."""
    server = Hub()
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    cache = tmp_path / "ggpy"
    cache.mkdir()
    for entry in build.cache_dir().iterdir():
        if entry.name not in ("models", "used"):  # compiled kernels are shared
            (cache / entry.name).symlink_to(entry)
    monkeypatch.setenv("GGPY_CACHE", str(cache))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    yield server
    server.stall = False
    server.shutdown()
    server.server_close()


@pytest.fixture
def environment(hub, tmp_path):
    """Variables for a process that asks the same stand-in and shares the caches."""
    own = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": str(tmp_path / "hub")}
    return {**os.environ, **own}
