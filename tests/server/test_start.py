"""A server that starts."""

import threading

from ggpy.generate.model import Model
from ggpy.server.models import Served

from .conftest import serving

BODY = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}


def test_until_the_model_is_loaded_it_is_unavailable(demo, monkeypatch):
    loaded, load = threading.Event(), Model.__init__

    def slow(*args, **kwargs):
        assert loaded.wait(60)
        load(*args, **kwargs)

    monkeypatch.setattr(Model, "__init__", slow)
    with serving([Served(name, demo, {"n_ctx": 256}) for name in "ab"], ready=False) as client:
        try:
            for path, body in (("/v1/chat/completions", BODY), ("/v1/messages", BODY), ("/tokenize", {"content": "x"})):
                for name in "ab":
                    refused = client.post(path, json={**body, "model": name})
                    assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
                    kind = {"/v1/messages": "overloaded_error"}.get(path, "unavailable_error")
                    assert refused.json()["error"]["type"] == kind
            assert client.get("/health").status_code == client.get("/v1/health").status_code == 503
            assert [one["id"] for one in client.get("/v1/models").json()["data"]] == ["a", "b"]
            assert client.get("/").status_code == client.get("/metrics").status_code == 200
        finally:
            loaded.set()
        while client.get("/health").status_code == 503:
            threading.Event().wait(0.01)
        assert client.get("/health").json() == {"status": "ok"}
        assert client.post("/v1/chat/completions", json={**BODY, "model": "b"}).status_code == 200


def test_a_model_that_cannot_be_loaded_is_told(tmp_path):
    path, told = tmp_path / "no.gguf", []
    path.write_bytes(b"no model")
    with serving([Served("no", path, {})], ready=False, on_failure=told.append):
        for _ in range(500):
            if told:
                break
            threading.Event().wait(0.01)
    assert "no.gguf" in str(told[0])
