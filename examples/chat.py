"""A conversation that keeps what was said.

    python examples/chat.py [MODEL]

The model that comes with ggpy was trained on one old book and goes on with what you say, in its manner.
"""

import sys

import ggpy

QUESTIONS = ("And the king said unto his servants,", "And the woman answered and said,")


def main(path: str) -> None:
    with ggpy.load(path, n_ctx=1024) as model:
        talk = model.session([{"role": "system", "content": "Be brief."}], drop_oldest=True)
        for question in QUESTIONS:
            print(f"> {question}")
            reply = talk.send(question, stream=True, max_tokens=40, temperature=0.7, seed=1)
            for piece in reply:
                print(piece, end="", flush=True)
            print(f"\n  ({len(reply.ids)} tokens; {reply.n_reused} of {len(reply.prompt_ids)} of the prompt were known)")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "demo")
