"""`ggpy run`: continue a prompt, or talk."""

import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..printable import visible
from .common import KVType, byte_count, open_model, text_of
from .sampling import sampling_values, with_sampling_flags

if TYPE_CHECKING:
    from ..generate.model import Generation, Model


@with_sampling_flags
def run(
    model: Annotated[str, typer.Argument(help="A .gguf file, a checkpoint folder or a hub id.", metavar="MODEL")],
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
    lookup: Annotated[
        bool,
        typer.Option("--lookup", help="Guess tokens where the text repeats what came before."),
    ] = False,
    draft: Annotated[
        str | None,
        typer.Option("--draft", help="A smaller model that guesses tokens; same vocabulary.", metavar="MODEL"),
    ] = None,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Print timings at the end.")] = False,
    **sampling: Any,
) -> None:
    """Continue a prompt, streaming the text. In a terminal without -p: talk to the model."""
    from ..file import read_input

    talk = prompt is None and sys.stdin is not None and sys.stdin.isatty()
    if prompt == "-" or (prompt is None and not talk):
        prompt = read_input()
    budget = None if ram_budget is None else byte_count(ram_budget)
    how = {"kv_type": kv_type, "mla": mla, "n_expert_used": n_expert_used, "ram_budget": budget}
    with ExitStack() as models:
        opened = models.enter_context(open_model(model, ctx, threads, **how))
        kept_to = {"json_schema": text_of(json_schema), "grammar": text_of(grammar), "regex": regex}
        options = {"max_tokens": max_tokens, "stop": stop, "lookup": lookup, **kept_to, **sampling_values(sampling)}
        if draft is not None:
            options["draft"] = models.enter_context(open_model(draft, opened.n_ctx, threads))
        first = [{"role": "system", "content": system}] if system else []
        if talk:
            _talk(opened, first, options, verbose)
        elif chat:
            _stream(opened, _prompt(opened, [*first, {"role": "user", "content": prompt or ""}]), options, verbose)
        else:
            _stream(opened, prompt or "", options, verbose)


def _prompt(model: "Model", messages: list[dict[str, str]]) -> list[int]:
    from ..errors import UnsupportedError

    template = model.chat_template
    if template is None:
        raise UnsupportedError(f"{model.file.path}: the file has no chat template; use -p without --chat")
    return template.encode(model.tokenizer, messages)


def _stream(model: "Model", prompt: str | list[int], options: dict, verbose: bool) -> str:
    generation = model.generate(prompt, **options)
    pieces = []
    terminal = sys.stdout.isatty()  # which a model's text must not give orders
    try:
        for piece in generation:
            pieces.append(piece)
            print(visible(piece) if terminal else piece, end="", flush=True)
    except KeyboardInterrupt:
        generation.cancel()
        print(flush=True)
        raise
    print(flush=True)
    if generation.finish_reason == "context":
        print(f"(the context of {model.n_ctx} tokens is full; -c N gives more)", file=sys.stderr)
    if verbose:
        _timings(model, generation)
    return "".join(pieces)


def _talk(model: "Model", messages: list[dict[str, str]], options: dict, verbose: bool) -> None:
    print("Say something; an empty line or Ctrl-D ends. Ctrl-C stops an answer.", file=sys.stderr)
    while True:
        try:
            said = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not said:
            return
        messages.append({"role": "user", "content": said})
        try:
            answer = _stream(model, _prompt(model, messages), options, verbose)
        except KeyboardInterrupt:
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": answer})


def _timings(model: "Model", generation: "Generation") -> None:
    prompt = len(generation.prompt_ids) - generation.n_reused
    lines = [
        f"load    {model.load_seconds:8.2f} s ({model.n_threads} threads)",
        f"prompt  {generation.prompt_seconds:8.2f} s  {prompt:6} tokens  {generation.prompt_rate:9.1f} tok/s",
        f"decode  {generation.decode_seconds:8.2f} s  {len(generation.ids):6} tokens  {generation.decode_rate:9.1f} tok/s",
        f"ended   by {generation.finish_reason}",
    ]
    if generation.n_drafted:
        right = generation.n_accepted / generation.n_drafted
        lines.append(f"guesses {generation.n_drafted:8} tokens, {right:.1%} right")
    memory = model.expert_memory
    if memory is not None:
        found = memory.n_found / memory.n_chosen
        lines.append(f"experts {memory.held / 1e9:8.2f} GB in memory; {found:.1%} of {memory.n_chosen} choices were there")
    print("\n".join(lines), file=sys.stderr)
