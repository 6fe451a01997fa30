"""Prompt lookup: guesses tokens where a text repeats what came before. It takes fewer runs and gives the same text.

python examples/speculation.py [MODEL]
"""

import sys

import ggpy

VERSE = "And the king said unto the woman, Fear not: for what sawest thou? And the woman said unto the king, "


def main(path: str) -> None:
    with ggpy.load(path, n_ctx=1024) as model:
        plain = model.generate(VERSE * 3, max_tokens=60, temperature=0).run()
        guessed = model.generate(VERSE * 3, max_tokens=60, temperature=0, lookup=True).run()
        print(f"{guessed.text}\n\n{guessed.n_accepted} of {guessed.n_drafted} guesses were right;", end=" ")
        print(f"the text is {'the same' if guessed.ids == plain.ids else 'another'}.")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "demo")
