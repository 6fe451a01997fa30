"""ggpy as a model of EleutherAI's Language Model Evaluation Harness (the package `lm_eval`), in its own process:

    python -m ggpy.measure.lm_eval run --model ggpy --model_args path=model.gguf --tasks arc_easy

takes all of the harness's own options. From Python, importing this module is enough for `model="ggpy"`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import Error
from ..generate.model import Model

try:
    import lm_eval.models  # noqa: F401 — the harness's own models are known only then
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise Error(f"the evaluation harness isn't there ({error}): pip install lm_eval") from None

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

_MAX_TOKENS = 256  # of an answer, where the task doesn't say: the harness's own default


@register_model("ggpy")
class GgpyLM(TemplateLM):
    """A GGUF file as a model of the harness.

    Requests are run together, as many at once as is good, so that the harness's batch size means nothing here; prompts
    that begin alike are computed once.

    Parameters
    ----------
    path : str
        The .gguf file; `pretrained` is taken, too, as other models of the harness have it.
    n_ctx, n_threads : int, optional
        See `ggpy.load`.
    """

    def __init__(
        self,
        path: str = "",
        pretrained: str = "",
        n_ctx: int | None = None,
        n_threads: int | None = None,
        batch_size: object = None,
        max_batch_size: object = None,
        device: object = None,
    ):
        super().__init__()
        self.model = Model(path or pretrained, n_ctx=n_ctx, n_threads=n_threads)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        eos = self.model.tokenizer.eos
        if eos is None:
            raise Error(f"{self.model.file.path}: no token ends a text")
        return eos

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without context."""
        bos = self.model.tokenizer.bos
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """Tells the harness's caches of requests apart."""
        return str(self.model.file.path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: object) -> list[int]:
        """Token ids of a text; the beginning-of-sequence token as the file says, unless `add_special_tokens` does."""
        bos = None if add_special_tokens is None else add_special_tokens and self.model.tokenizer.add_bos
        return self.model.tokenizer.encode_prompt(string) if bos is None else self.model.tokenize(string, bos=bos)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **kwargs: object
    ) -> list[tuple[float, bool]]:
        n_ctx = self.model.n_ctx
        pairs = []
        for _, context, continuation in requests:
            # As the harness's other models do: what is too long loses its beginning. The last token isn't evaluated.
            context = context[max(0, len(context) + len(continuation) - n_ctx) :]
            pairs.append((context, continuation))
        results = [(score.logprob, score.is_greedy) for score in self.model.score_batch(pairs)]
        for (texts, _, _), result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    def loglikelihood_rolling(self, requests: "Sequence[Instance]", disable_tqdm: bool = False) -> list[float]:
        """The log-likelihoods of whole texts, in windows of the context's length."""
        n_ctx = self.model.n_ctx - 1
        pairs, owners = [], []
        for i, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=n_ctx,
                context_len=1,
            )
            for window in map(make_disjoint_window, windows):
                pairs.append(window)
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, score in zip(owners, self.model.score_batch(pairs), strict=True):
            totals[i] += score.logprob
        return totals

    def generate_until(self, requests: "Sequence[Instance]", disable_tqdm: bool = False) -> list[str]:
        """Answers, each up to the texts that end it."""
        generations = []
        for request in requests:
            prompt, how = request.args
            generations.append(self.model.generate(self._shortened(prompt, how), **_options(how)))
        return [generation.run().text for generation in generations]

    def _shortened(self, prompt: str, how: Mapping[str, Any]) -> list[int]:
        """The prompt's last tokens, with room for the answer."""
        return self.tok_encode(prompt)[-max(1, self.model.n_ctx - int(how.get("max_gen_toks", _MAX_TOKENS))) :]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation."""
        template = self.model.chat_template
        if template is None:
            raise Error(f"{self.model.file.path}: the file has no chat template")
        return template.render(chat_history, add_generation_prompt=add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's source, for the harness's records."""
        template = self.model.chat_template
        return template.source if template is not None and chat_template else None


def _options(how: Mapping[str, Any]) -> dict[str, Any]:
    """What the harness asks of a generation, in our words."""
    until = how.get("until", ())
    sampled = how.get("do_sample", True) and how.get("temperature", 0) > 0
    return {
        "max_tokens": int(how.get("max_gen_toks", _MAX_TOKENS)),
        "stop": [until] if isinstance(until, str) else [text for text in until if text],
        "temperature": float(how["temperature"]) if sampled else 0,
        **({"top_p": float(how["top_p"]), "top_k": 0, "min_p": 0, "seed": 0} if sampled and "top_p" in how else {}),
    }


def main(arguments: Iterable[str] | None = None) -> None:
    """The harness's own command line, with ggpy among its models."""
    import sys

    from lm_eval.__main__ import cli_evaluate

    if arguments is not None:
        sys.argv[1:] = arguments
    cli_evaluate()


if __name__ == "__main__":
    main()
