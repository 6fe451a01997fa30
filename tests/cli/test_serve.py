"""`ggpy serve`, as a process."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_server_without_a_model_serves_the_demo_and_lets_answers_finish_when_it_must_end():
    command = [sys.executable, "-m", "ggpy", "serve", "--port", "0", "--temp", "0", "-c", "512"]
    environment = {**os.environ, "GGPY_API_KEY": "secret"}
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        lines, port = [], None
        for line in server.stderr:
            lines.append(line)
            if found := re.search(r"running on http://127.0.0.1:(\d+)", line):
                port = found[1]
                break
        assert port, "".join(lines)
        rest = []
        reader = threading.Thread(target=lambda: rest.extend(server.stderr))
        reader.start()
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers={"X-Api-Key": "secret"}, timeout=60) as client:
            while client.get("/health").status_code == 503:
                time.sleep(0.05)
            (model,) = client.get("/v1/models").json()["data"]
            assert model["id"] == "demo" and model["meta"]["n_ctx"] == 512
            body = {"prompt": "Once", "max_tokens": 100, "ignore_eos": True, "stream": True}
            headers = {"X-Request-Id": "my-own"}
            with client.stream("POST", "/v1/completions", json=body, headers=headers) as response:
                assert response.headers["x-request-id"] == "my-own"
                parts = response.iter_lines()
                next(parts)
                server.send_signal(signal.SIGTERM)
                assert list(parts)[-2:] == ["data: [DONE]", ""]
        assert server.wait(30) in (0, 128 + signal.SIGTERM)
        reader.join()
        records = [json.loads(line) for line in rest if line.startswith("{")]
        (record,) = [r for r in records if r.get("id") == "my-own"]
        assert record["status"] == 200 and record["completion"] == 100
        assert "/health" not in {r.get("path") for r in records}
    finally:
        server.kill()
        server.wait()


def test_a_port_that_is_taken_is_said_before_anything_is_loaded(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "ggpy", "serve", str(tmp_path / "missing.gguf"), "--port", port]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1 and f"can't listen at 127.0.0.1, port {port}: " in ended.stderr
    assert len(ended.stderr.splitlines()) == 1 and "missing.gguf" not in ended.stderr
