"""Tasks to answers, as many at once as a model takes."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeAlias

from ..errors import Error
from ..generate.generation import Generation
from ..generate.model import Model
from ..generate.piece import Piece
from ..generate.session import Reply
from .tasks import Task

#: What a task gives: a dict that JSON can hold. `error`, or
#: text, finish_reason, prompt_tokens, completion_tokens; thinking, tool_calls, logprobs where there are any;
#: embeddings, prompt_tokens; label, scores, prompt_tokens.
Answer: TypeAlias = dict[str, Any]

_TOGETHER = 64  # tasks without a text of their own that are computed together


def answers(model: Model, tasks: Iterable[Task]) -> Iterator[list[tuple[Task, Answer]]]:
    """The answers to tasks as they end, several at a time or, while all go on, none.

    Tasks are read as there is room for them. Several threads may do this with the same model, each for tasks of its own.

    Raises
    ------
    Error
        What isn't a task's fault: the model is closed, or its file has changed.
    """
    tasks = iter(tasks)
    active: list[tuple[Task, Generation]] = []
    groups: dict[str, list[Task]] = {"embed": [], "label": []}
    more = True
    while more or active:
        ended: list[tuple[Task, Answer]] = []
        new = list(islice(tasks, max(0, model.room - len(active))))
        more = bool(new) or len(active) >= model.room
        for task in new:
            if task.error:
                ended.append((task, {"error": task.error}))
            elif task.kind in groups:
                groups[task.kind].append(task)
            else:
                try:
                    active.append((task, _started(model, task)))
                except Error as error:
                    ended.append((task, {"error": str(error)}))
        for kind, group in groups.items():
            while len(group) >= _TOGETHER or (group and not more):
                together, group[:] = group[:_TOGETHER], group[_TOGETHER:]
                ended += zip(together, _computed(model, together, _COMPUTED[kind]), strict=True)
        if active:
            active[0][1].wait()
        going = []
        for task, generation in active:
            try:
                if generation.take():
                    ended.append((task, _answer(model, generation)))
                else:
                    going.append((task, generation))
            except Error as error:
                model.check()
                ended.append((task, {"error": str(error)}))
        active = going
        yield ended


def _started(model: Model, task: Task) -> Generation:
    if task.kind == "chat":
        return model.chat(task.given, stream=True, **task.options)
    return model.generate(task.given, **task.options)


def _answer(model: Model, generation: Generation) -> Answer:
    answer: Answer = {"text": generation.text}
    if isinstance(generation, Reply):
        answer["text"] = generation.answer
        answer |= {"thinking": generation.thinking} if generation.thinking else {}
        answer |= {"tool_calls": generation.tool_calls} if generation.tool_calls else {}
    answer["finish_reason"] = generation.finish_reason
    answer["prompt_tokens"], answer["completion_tokens"] = len(generation.prompt_ids), len(generation.ids)
    pieces = generation.pieces
    if pieces and pieces[0].logprob is not None:
        answer["logprobs"] = [_logprob(model, piece) for piece in pieces]
    return answer


def _logprob(model: Model, piece: Piece) -> dict[str, Any]:
    def entry(token: int, text: str, logprob: float | None) -> dict[str, Any]:
        return {"token": token, "text": text, "logprob": logprob}

    top = [entry(t, model.tokenizer.decode([t], special=True), p) for t, p in piece.top_logprobs.items()]
    return {**entry(piece.token, piece.text, piece.logprob), "top": top}


def _computed(
    model: Model, group: Sequence[Task], compute: Callable[[Model, Sequence[Task]], list[Answer]]
) -> list[Answer]:
    """The answers of a group; one by one where one of them is at fault."""
    try:
        return compute(model, group)
    except Error as error:
        model.check()
        if len(group) == 1:
            return [{"error": str(error)}]
        return [answer for task in group for answer in _computed(model, [task], compute)]


def _embedded(model: Model, group: Sequence[Task]) -> list[Answer]:
    texts = [text for task in group for text in _texts(task)]
    ids = [model.tokenizer.encode(text) if isinstance(text, str) else text for text in texts]
    vectors, lengths = iter(model.embed(ids)), iter(map(len, ids))
    found: list[Answer] = []
    for task in group:
        n = len(_texts(task))
        # The shortest decimal number that stands for each float32.
        embeddings = [[float(str(x)) for x in vector] for vector in islice(vectors, n)]
        found.append({"embeddings": embeddings, "prompt_tokens": sum(islice(lengths, n))})
    return found


def _texts(task: Task) -> Sequence[Any]:
    """The texts of a task, each as text or as token ids."""
    given = task.given
    return given if isinstance(given, list) and not (given and isinstance(given[0], int)) else [given]


def _labelled(model: Model, group: Sequence[Task]) -> list[Answer]:
    pairs, lengths = [], []
    for task in group:
        prompt, tokenizer = task.given, model.tokenizer
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            # A reply begins with a token of its own, whatever a template ends with.
            prompt = tokenizer.encode_prompt(model.chat_prompt(prompt))
        is_text = isinstance(prompt, str)
        lengths.append(len(tokenizer.encode(prompt) if is_text else prompt))
        pairs += [(prompt, label if is_text else tokenizer.encode_inside(label)) for label in task.labels]
    scores = iter(model.score_batch(pairs))
    found: list[Answer] = []
    for task, length in zip(group, lengths, strict=True):
        logprobs = {label: next(scores).logprob for label in task.labels}
        own = [{"label": label, "logprob": logprob} for label, logprob in logprobs.items()]
        found.append({"label": max(logprobs, key=logprobs.__getitem__), "scores": own, "prompt_tokens": length})
    return found


_COMPUTED = {"embed": _embedded, "label": _labelled}
