"""What the tasks make of a text with one verse a line."""

from datasets import Dataset


def halves(lines: Dataset) -> Dataset:
    """Verses in two halves; the second stands among those of the verses that follow."""
    verses = [line["text"].split() for line in lines if line["text"].strip()]
    ends = [" " + " ".join(words[len(words) // 2 :]) for words in verses]
    made = []
    for i, words in enumerate(verses):
        answer = i % 4
        choices = [ends[(i + j - answer) % len(verses)] for j in range(4)]
        made.append({"begin": " ".join(words[: len(words) // 2]), "ends": choices, "answer": answer})
    return Dataset.from_list(made)


def passages(lines: Dataset) -> Dataset:
    """Eight verses at a time."""
    verses = [line["text"] for line in lines]
    return Dataset.from_list([{"passage": "\n".join(verses[i : i + 8])} for i in range(0, len(verses), 8)])
