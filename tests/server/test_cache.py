"""Conversations outlive the server."""

from ggpy.server.models import Cache, Served

from .conftest import serving

HELLO = {"role": "user", "content": "Tell me a long story about the sea and all who live there. " * 12}


def ask(client, messages):
    body = {"messages": messages, "max_tokens": 8, "temperature": 0}
    answer = client.post("/v1/chat/completions", json=body).json()
    return answer["choices"][0]["message"]["content"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_a_conversation_is_found_again_after_a_restart_and_goes_on_with_the_same_bits(demo, tmp_path):
    more = {"role": "user", "content": "Go on."}
    with serving([Served("demo", demo, {"n_ctx": 1024})]) as client:
        first, _ = ask(client, [HELLO])
        said = [HELLO, {"role": "assistant", "content": first}, more]
        expected, n_cached = ask(client, said)
        assert n_cached > 100
    folder = tmp_path / "cache"
    with serving([Served("demo", demo, {"n_ctx": 1024}, Cache(folder, 1 << 30))]) as client:
        assert ask(client, [HELLO])[0] == first
    with serving([Served("demo", demo, {"n_ctx": 1024}, Cache(folder, 1 << 30))]) as client:
        assert ask(client, said) == (expected, n_cached // 64 * 64)  # whole pages are kept
    for file in folder.iterdir():
        file.write_bytes(b"nothing")
    with serving([Served("demo", demo, {"n_ctx": 1024}, Cache(folder, 1 << 30))]) as client:
        assert ask(client, said) == (expected, 0)
