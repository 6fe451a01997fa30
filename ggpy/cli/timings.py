"""How fast a generation was, and what it took."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..generate.generation import Generation
    from ..generate.model import Model


def timings(model: "Model", generation: "Generation | None") -> list[str]:
    """Lines about a model and, if there is one, a generation that has ended."""
    lines = [f"load    {model.load_seconds:8.2f} s ({model.n_threads} threads)"]
    n_used = 0
    if generation is not None:
        n_prompt, n = len(generation.prompt_ids) - generation.n_reused, len(generation.ids)
        n_used = len(generation.prompt_ids) + max(0, n - 1)  # the last token isn't evaluated
        lines += [
            f"prompt  {generation.prompt_seconds:8.2f} s  {n_prompt:6} tokens  {generation.prompt_rate:9.1f} tok/s",
            f"decode  {generation.decode_seconds:8.2f} s  {n:6} tokens  {generation.decode_rate:9.1f} tok/s",
            f"reused  {generation.n_reused:8} tokens of the prompt",
            *_guesses(generation),
            f"ended   by {generation.finish_reason}",
        ]
    lines.append(f"context {n_used:8} of {model.n_ctx} tokens; keys and values take {model.kv_bytes / 1e6:,.0f} MB at most")
    memory = model.expert_memory
    if memory is not None:
        found = memory.n_found / memory.n_chosen if memory.n_chosen else 0.0
        lines.append(f"experts {memory.held / 1e9:8.2f} GB in memory; {found:.1%} of {memory.n_chosen} choices were there")
    return lines


def _guesses(generation: "Generation") -> list[str]:
    if not generation.n_drafted:
        return []
    return [f"guesses {generation.n_drafted:8} tokens, {generation.n_accepted / generation.n_drafted:.1%} right"]
