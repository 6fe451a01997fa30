"""Servers on loopback, with models that ship with ggpy."""

import asyncio
import threading
import time
from contextlib import contextmanager

import httpx
import pytest
import uvicorn

from ggpy.hub import model_file
from ggpy.server.app import application
from ggpy.server.connections import config
from ggpy.server.guard import Limits
from ggpy.server.models import Served


@contextmanager
def serving(served, limits=None, memory=1 << 40, defaults=None, ready=True, on_failure=None):
    """A client of a server with these models, by default when the first one is loaded."""
    app = application(served, memory, limits or Limits(), defaults or {}, None, on_failure)
    server = uvicorn.Server(config(app, "127.0.0.1", 0))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server doesn't start"
        thread.join(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            while ready and client.get("/health").status_code == 503:
                time.sleep(0.01)
            yield client
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the server doesn't end"


@pytest.fixture(scope="session")
def demo():
    """The demo model's file."""
    return model_file("demo")


@pytest.fixture(scope="module")
def client(demo):
    """A client of a server with the demo model."""
    with serving([Served("demo", demo, {"n_ctx": 1024})]) as client:
        yield client
