"""Clients that are slow, or send too much: others go on, and nothing waits for ever."""

import json
import socket
import time
from contextlib import contextmanager

import pytest

from ggpy.server import connections
from ggpy.server.models import Served

from .conftest import serving

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture(scope="module")
def served(demo):
    return Served("demo", demo, {"n_ctx": 1024})


@pytest.fixture(scope="module")
def client(served):
    made = connections.Connection.connection_made

    def with_little_room(self, transport):
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        made(self, transport)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connections, "SECONDS", 0.5)
        patch.setattr(connections.Connection, "connection_made", with_little_room)
        with serving([served]) as client:
            yield client


@contextmanager
def connected(client):
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(30)
        sock.connect(("127.0.0.1", client.base_url.port))
        yield sock


def rest_of(sock):
    """What comes until the connection ends."""
    data = b""
    try:
        while piece := sock.recv(1 << 16):
            data += piece
    except ConnectionResetError:
        pass
    return data


def test_a_body_that_is_too_long_is_refused_before_it_is_sent(client):
    with connected(client) as sock:
        sock.sendall(HEAD + b"Content-Length: 100000000\r\n\r\n")
        assert sock.recv(100).startswith(b"HTTP/1.1 413")


def test_headers_without_an_end_are_refused(client):
    with connected(client) as sock:
        try:
            sock.sendall(HEAD + b"X-Long: " + b"x" * 1_000_000)
        except (ConnectionResetError, BrokenPipeError):
            return
        assert b" 400 " in rest_of(sock)[:20]


@pytest.mark.parametrize("sent", [b"", HEAD])
def test_a_request_that_does_not_come_is_not_waited_for(client, sent):
    with connected(client) as sock:
        sock.sendall(sent)
        start = time.monotonic()
        assert rest_of(sock) == b"" and time.monotonic() - start < 20


def test_connections_that_are_used_stay(client):
    with connected(client) as sock:
        for _ in range(8):
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            data = b""
            while not data.endswith(b"}"):
                piece = sock.recv(1 << 16)
                assert piece, "the connection was ended"
                data += piece
            time.sleep(0.1)


def test_who_does_not_read_holds_up_nobody_and_is_let_go(client, served):
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 900, "stream": True, "logprobs": True}
    data = json.dumps({**body, "top_logprobs": 20, "ignore_eos": True}).encode()
    with connected(client) as sock:
        sock.sendall(HEAD + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
        while not served.engine._streams:
            time.sleep(0.01)
        (generation,) = served.engine._streams[0].generations
        done = client.post("/v1/completions", json={"prompt": "Once", "max_tokens": 20, "ignore_eos": True}).json()
        assert done["usage"]["completion_tokens"] == 20
        for _ in range(3000):
            assert len(generation._request.pieces) <= 256
            if generation.finish_reason is not None and not served.n_answers:
                break
            time.sleep(0.01)
        assert generation.finish_reason == "cancelled" and len(generation.ids) < 900
