"""`ggpy run`: continue a prompt, or talk."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UnsupportedError
from ..file import folder_of
from .common import MODEL_HELP, KVType, byte_count, open_model, text_of
from .memory import memory_line, memory_warning
from .sampling import sampling_values, with_sampling_flags
from .terminal import AnswerWriter
from .timings import timings

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..generate.generation import Generation
    from ..generate.model import Model


@with_sampling_flags
def run(
    model: Annotated[str, typer.Argument(help=MODEL_HELP, metavar="MODEL")],
    prompt: Annotated[
        str | None, typer.Option("-p", "--prompt", help="Text to continue; without it, or -: standard input.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Take the prompt as a user's message, by the chat template.")
    ] = False,
    system: Annotated[str | None, typer.Option("--system", help="The system message of a chat.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option("-n", "--max-tokens", min=-1, help="Tokens at most; -1: no limit.")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="A text that ends the answer; may be repeated.")] = None,
    json_schema: Annotated[
        str | None,
        typer.Option("--json-schema", help="The answer is JSON that this schema allows; {}: any.", metavar="FILE_OR_TEXT"),
    ] = None,
    grammar: Annotated[
        str | None,
        typer.Option("--grammar", help="The answer keeps to this grammar, in Lark or GBNF.", metavar="FILE_OR_TEXT"),
    ] = None,
    regex: Annotated[
        str | None, typer.Option("--regex", help="This regular expression matches the whole answer.", metavar="TEXT")
    ] = None,
    ctx: Annotated[int | None, typer.Option("-c", "--ctx", min=1, help="Tokens of context.")] = None,
    threads: Annotated[int | None, typer.Option("-t", "--threads", min=1, help="Default: physical cores.")] = None,
    kv_type: KVType = "f16",
    mla: Annotated[str, typer.Option("--mla", help="Form of latent attention: absorbed or naive.")] = "absorbed",
    n_expert_used: Annotated[
        int | None, typer.Option("--n-expert-used", min=1, help="Experts for each token; default: as trained.")
    ] = None,
    ram_budget: Annotated[
        str | None, typer.Option("--ram-budget", help="Memory for a bigger mixture of experts: 6G, 512M.")
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option("--lora", help="A LoRA adapter, .gguf or a folder; may be repeated.", metavar="PATH[:SCALE]"),
    ] = None,
    lookup: Annotated[
        bool,
        typer.Option("--lookup", help="Guess tokens where the text repeats what came before."),
    ] = False,
    draft: Annotated[
        str | None,
        typer.Option(
            "--draft",
            help="A smaller model that guesses tokens; same vocabulary. mtp: the model's own layer for that.",
            metavar="MODEL",
        ),
    ] = None,
    prompt_cache: Annotated[
        Path | None, typer.Option("--prompt-cache", help="File that keeps the prompt's keys and values for the next start.")
    ] = None,
    drop_oldest: Annotated[
        bool, typer.Option("--drop-oldest", help="Talking: drop the oldest messages when the context is full.")
    ] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Print timings at the end.")] = False,
    **sampling: Any,
) -> None:
    """Continue a prompt, streaming the text. In a terminal without -p: talk to the model."""
    from ..file import read_input
    from ..generate.memory import available_memory

    talk = prompt is None and sys.stdin is not None and sys.stdin.isatty()
    if prompt == "-" or (prompt is None and not talk):
        prompt = read_input()
    budget = None if ram_budget is None else byte_count(ram_budget)
    how = {"kv_type": kv_type, "mla": mla, "n_expert_used": n_expert_used, "ram_budget": budget, "lora": lora}
    if prompt_cache is not None:
        folder_of(prompt_cache)  # before long work
    with ExitStack() as models:
        opened = models.enter_context(open_model(model, ctx, threads, **how))
        if budget is None:
            warning = memory_warning(model, opened, available_memory())
            if warning or verbose:
                print(warning or memory_line(opened.memory_use()), file=sys.stderr)
        if prompt_cache is not None and prompt_cache.exists():
            opened.load_cache(prompt_cache)
        if (talk or chat) and not opened.file.get("tokenizer.chat_template", str, default=""):
            raise UnsupportedError(f"{opened.file.path}: the file has no chat template; -p TEXT continues a text")
        kept_to = {"json_schema": text_of(json_schema), "grammar": text_of(grammar), "regex": regex}
        options = {"max_tokens": max_tokens, "stop": stop, "lookup": lookup, **kept_to, **sampling_values(sampling)}
        if draft is not None:
            options["draft"] = draft if draft == "mtp" else models.enter_context(open_model(draft, opened.n_ctx, threads))
        first = [{"role": "system", "content": system}] if system else []
        if talk:
            from ..kernels.build import cache_dir
            from .talk import Talk
            from .terminal import reader

            conversation = Talk(opened, opened.session(first, drop_oldest=drop_oldest), options, sys.stdout, verbose)
            with _kept(opened, prompt_cache, lambda: conversation.reply):
                conversation.run(reader(cache_dir() / "history"))
            return
        if chat:
            messages = [*first, {"role": "user", "content": prompt or ""}]
            generation: Generation = opened.chat(messages, stream=True, **options)
        else:
            generation = opened.generate(prompt or "", **options)
        with _kept(opened, prompt_cache, lambda: generation):
            _stream(opened, generation, verbose)


def _stream(model: "Model", generation: "Generation", verbose: bool) -> None:
    try:
        AnswerWriter(sys.stdout).write(generation)
    except KeyboardInterrupt:
        generation.cancel()
        raise
    if generation.finish_reason == "context":
        print(f"(the context of {model.n_ctx} tokens is full; -c N gives more)", file=sys.stderr)
    if verbose:
        print("\n".join(timings(model, generation)), file=sys.stderr)


@contextmanager
def _kept(model: "Model", path: Path | None, generation: "Callable[[], Generation | None]") -> Iterator[None]:
    """Writes what a generation has computed to a file, if one is named, also after an interrupt."""
    try:
        yield
    finally:
        done = generation()
        if path is not None and done is not None and done.ids:
            done.cancel()
            model.save_cache(path, [*done.prompt_ids, *done.ids[:-1]])
