"""A batch: all rows of a file, each answered once, however often the run is ended and begun again."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ..errors import Error
from ..generate.model import Model
from ..generate.options import ChatOptions, with_options
from . import openai
from .answers import Answer, answers
from .output import Output
from .rows import Source, is_parquet
from .tasks import Settings, Task, has_columns, task_of

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass
class Summary:
    """What a run of a batch has done.

    Attributes
    ----------
    n_rows : int
        Rows that there are, of this shard.
    n_before : int
        Of them, those that had a result already.
    n_errors : int
        Results of this run that are errors.
    prompt_tokens, completion_tokens : int
        Of this run.
    seconds : float
    """

    n_rows: int
    n_before: int
    n_errors: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    n_new: int = 0

    @property
    def rate(self) -> float:
        """Tokens written per second; if none are, tokens read."""
        tokens = self.completion_tokens or self.prompt_tokens
        return tokens / self.seconds if self.seconds else 0.0

    def count(self, answer: Answer) -> None:
        """Counts an answer in."""
        self.n_new += 1
        self.n_errors += "error" in answer
        self.prompt_tokens += answer.get("prompt_tokens", 0)
        self.completion_tokens += answer.get("completion_tokens", 0)


#: Called as progress(summary) with what has been done so far.
Progress = Callable[[Summary], None]
#: Gives tasks' answers as they end.
Compute = Callable[[Iterator[Task]], Iterator[list[tuple[Task, Answer]]]]


class Form:
    """How rows are read and results written: as OpenAI's lines if the first row is one of these, else as plain columns.

    Parameters
    ----------
    source : Source
    settings : Settings
    digest : str
        Of the model.
    model : str
        Its name.

    Raises
    ------
    Error
        No row has what a batch needs.
    """

    def __init__(self, source: Source, settings: Settings, digest: str, model: str):
        self.settings, self.digest, self.model = settings, settings.digest(digest), model
        unread = next(iter(source), None)
        first = next((row.columns for row in source if not row.error), None)
        if first is None and unread is not None:
            raise Error(f"{source.name}: no row can be read; the first: {unread.error}")
        self.is_openai = first is not None and openai.is_request(first)
        if first is not None and not self.is_openai and not any(has_columns(row.columns) for row in source):
            raise Error(f"{source.name}: no row has a prompt or messages; the first has {', '.join(first) or 'nothing'}")

    def tasks(self, source: Source) -> Iterator[Task]:
        """The rows' tasks."""
        read = openai.task_of if self.is_openai else task_of
        return (read(row, self.settings, self.digest) for row in source)

    def result(self, task: Task, answer: Answer) -> dict[str, Any]:
        """What is written for an answer."""
        if self.is_openai:
            return openai.result_of(task, answer, self.model)
        result = {"id": task.id, "key": task.key, **answer}
        if "embeddings" in result:
            result["embedding"] = result.pop("embeddings")[0]
        return result

    def known(self, result: Mapping[str, Any]) -> tuple[object, object]:
        """The id and key of a result."""
        return openai.known(result) if self.is_openai else (result.get("id"), result.get("key"))


def survey(form: Form, source: Source, shard: tuple[int, int]) -> dict[str, str]:
    """The key of each task of a shard, by id as text.

    Raises
    ------
    Error
        Two rows have the same id, in whatever shard.
    """
    keys: dict[str, str] = {}
    ids = set()
    for index, task in enumerate(form.tasks(source)):
        id = str(task.id)
        if id in ids:
            raise Error(f"{source.name}: two rows with {task.name}")
        ids.add(id)
        if index % shard[1] == shard[0] - 1:
            keys[id] = task.key
    return keys


def check_done(done: Mapping[str, str], keys: Mapping[str, str], path: Path, ordered: bool) -> None:
    """Sees to it that results of earlier runs are those that this one would give.

    Raises
    ------
    Error
        They aren't, or stand in another order.
    """
    for id, key in done.items():
        if id not in keys:
            raise Error(f"{path}: has a result of id {id!r}, for which there is no row; name another output")
        if keys[id] != key:
            raise Error(f"{path}: the result of id {id!r} is of another row, model, option or version; name another output")
    if ordered and any(a != b for a, b in zip(done, keys, strict=False)):
        raise Error(f"{path}: its results aren't in the rows' order; name another output")


def in_order(tasks: Iterator[Task], found: Compute) -> Iterator[list[tuple[Task, Answer]]]:
    """The same pairs, in the tasks' order: whoever is early is kept back."""
    waiting: list[Task] = []
    kept: dict[str, tuple[Task, Answer]] = {}

    def noted() -> Iterator[Task]:
        for task in tasks:
            waiting.append(task)
            yield task

    for pairs in found(noted()):
        kept.update({str(task.id): (task, answer) for task, answer in pairs})
        n = 0
        while n < len(waiting) and str(waiting[n].id) in kept:
            n += 1
        yield [kept.pop(str(task.id)) for task in waiting[:n]]
        del waiting[:n]


@with_options(ChatOptions)
def batch(
    model: str | Path | Model,
    rows: str | Path | Sequence[Mapping[str, Any]],
    output: str | Path,
    *,
    ordered: bool = False,
    embed: bool = False,
    labels: Sequence[str] = (),
    shard: tuple[int, int] = (1, 1),
    ray: str | None = None,
    load: Mapping[str, Any] = MappingProxyType({}),
    progress: Progress | None = None,
    **options: "Unpack[ChatOptions]",
) -> Summary:
    """Answers all rows of a file, as many at once as is good.

    Results are added to the output as they come. A run that was ended, at whatever moment, goes on where it stopped when
    it is called again: each row has one result in the end. A row's text doesn't depend on its company, its shard or how
    often the run was begun: by default its random numbers come from its id.

    Parameters
    ----------
    model : str, Path or Model
        A model, or what `ggpy.load` takes.
    rows : str, Path or sequence of mappings
        JSON lines, a Parquet file (by the suffix .parquet) or the rows themselves. Columns: `id`, a text or number, else
        the row's place; `prompt`, text or token ids, or `messages`; `options`, this row's own, by the names below;
        `labels`. Others are the user's own. Or OpenAI's batch requests, with `custom_id`, `method`, `url` and `body`.
    output : str or Path
        JSON lines or Parquet, by the suffix. For each row its `id`; a `key`, which tells the row with its model and
        options from others; and `text`, `finish_reason`, `prompt_tokens`, `completion_tokens`, or `error`. Answers to
        messages may have `thinking` and `tool_calls`. For OpenAI's requests, OpenAI's results.
    ordered : bool
        Whether results are in the rows' order; otherwise, as they come.
    embed : bool
        Results have an `embedding` instead.
    labels : sequence of str
        Texts of which one follows each prompt: results have the likeliest, `label`, and the log-probabilities of all,
        `scores`. A space in front belongs to a label.
    shard : (int, int)
        (i, n): only each n-th row, from the i-th on, i from 1 to n; for runs of the same rows on several machines, each
        with its own output.
    ray : str, optional
        The address of a Ray cluster whose nodes do the work: HOST:PORT, ray://HOST:PORT, "auto", or "local" for one of this
        machine alone. They need ggpy and, at the same path, the model. What is lost with a worker is done again elsewhere.
    load : mapping
        For `ggpy.load`, where `model` is a path: on several machines each worker has `n_threads`. With `stages` a cluster's
        nodes share the layers; otherwise each has all.
    progress : callable, optional
        Called as progress(summary), again and again.
    **options

    Returns
    -------
    Summary
        How many rows, errors and tokens.

    Raises
    ------
    Error
        The rows can't be read, or two have the same id; the output has results of other rows, another model or other
        options, or can't be written. A row that can't be answered is no reason: its result is an error.
    """
    settings = Settings(options, embed, tuple(labels))
    how = (rows, output, ordered, settings, shard, progress)
    if not isinstance(model, (str, Path)):
        if ray is not None:
            raise Error("workers on other machines open the model themselves: give its path")
        return _run(model, *how)
    from .. import load as opened

    with ExitStack() as stack:
        is_pipeline = load.get("stages", 1) > 1
        how_loaded: dict[str, Any] = {**load, "ray": ray if is_pipeline else None}
        here = stack.enter_context(opened(model, **how_loaded))
        if ray is None or is_pipeline:
            return _run(here, *how)
        from .cluster import cluster

        return _run(here, *how, stack.enter_context(cluster(ray, here, load)).answers)


def _run(
    model: Model,
    rows: str | Path | Sequence[Mapping[str, Any]],
    output: str | Path,
    ordered: bool,
    settings: Settings,
    shard: tuple[int, int],
    progress: Progress | None,
    elsewhere: Compute | None = None,
) -> Summary:
    if not 1 <= shard[0] <= shard[1]:
        raise Error(f"shard {shard[0]} of {shard[1]}: the first is 1")
    path = Path(output)
    source = Source(rows)
    if source.path is not None and path.exists() and path.samefile(source.path):
        raise Error(f"{path}: the rows' own file; name another output")
    form = Form(source, settings, f"{model.digest} {model.n_ctx}", model.file.path.stem)
    if form.is_openai and is_parquet(path):
        raise Error(f"{path}: results of OpenAI's requests are JSON lines")
    if not settings.embed and not settings.labels and not form.is_openai:  # an error of all rows is none of each
        model.generate([0], **{**_without_chat(settings.options), "max_tokens": 0})
    keys = survey(form, source, shard)
    started = time.perf_counter()
    results = Output(path, form.known)
    try:
        check_done(results.done, keys, path, ordered)
        summary = Summary(len(keys), len(results.done))
        left = (task for task in form.tasks(source) if str(task.id) in keys and str(task.id) not in results.done)

        found = elsewhere or partial(answers, model)
        for pairs in in_order(left, found) if ordered else found(left):
            if pairs:
                results.add(form.result(task, answer) for task, answer in pairs)
            for _, answer in pairs:
                summary.count(answer)
            summary.seconds = time.perf_counter() - started
            if progress is not None:
                progress(summary)
        results.finish()
    finally:
        results.close()
    return summary


def _without_chat(options: Mapping[str, Any]) -> dict[str, Any]:
    return {n: v for n, v in options.items() if n not in ("tools", "chat_template_kwargs")}
