"""A model, ready to use: text in, text out."""

import time
from collections.abc import Generator, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ContextFullError, Error
from ..file import GGUFFile
from ..graph import Graph, Team, default_threads
from ..models import build_graph, read_architecture
from .chat import ChatTemplate
from .sampling import Sampler
from .sequence import TokenSequence
from .streaming import StopMatcher, StreamDecoder
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from ..graph import Hook
    from ..kernels.build import Progress

DEFAULT_CONTEXT = 8192
DEFAULT_BATCH = 512


class Model:
    """A GGUF file opened for running.

    Parameters
    ----------
    path : str or Path
        A .gguf file; of a split model, any part.
    n_ctx : int, optional
        Tokens of context; by default what the model was trained with, but not more than 8192. Memory is taken as tokens
        come.
    n_threads : int, optional
        By default one for each physical core that this process may use.
    n_batch : int
        Tokens of a prompt that are run at once.
    kv_type : {"f16", "q8_0", "f32"}
        Of the cached keys and values. Q8_0 takes about half the memory of float16.
    n_expert_used : int, optional
        Experts for each token of a mixture, instead of the file's number.
    mla : {"absorbed", "naive"}
        How latent attention (DeepSeek) is computed: over cached latent vectors, or over keys and values of all heads,
        which takes several times the memory.
    ram_budget : int, optional
        Bytes of memory that a mixture of experts bigger than that may take: experts are kept by use and read when their
        router has spoken. Costs time where the model fits.
    progress : callable, optional
        Called as progress(done, total, kernel) while kernels are compiled, which happens once per machine.

    Raises
    ------
    GGUFError
        The file is damaged, or lacks a tensor or key.
    UnsupportedError
        An architecture or block type that ggpy doesn't have.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        n_ctx: int | None = None,
        n_threads: int | None = None,
        n_batch: int = DEFAULT_BATCH,
        kv_type: str = "f16",
        n_expert_used: int | None = None,
        mla: str = "absorbed",
        ram_budget: int | None = None,
        progress: "Progress | None" = None,
    ):
        started = time.perf_counter()
        if (n_ctx is not None and n_ctx < 1) or n_batch < 1:
            raise Error(f"n_ctx and n_batch are at least 1, not {n_ctx} and {n_batch}")
        self.file = GGUFFile(path)
        self._team: Team | None = None
        try:
            self.architecture = read_architecture(self.file, n_expert_used, mla)
            self.n_ctx = n_ctx or min(self.architecture.n_ctx_train, DEFAULT_CONTEXT)
            self._team = Team(n_threads or default_threads(), progress)
            self.sequence = TokenSequence(
                self.file, self.architecture, self.n_ctx, n_batch, self._team, kv_type.upper(), ram_budget, progress
            )
        except BaseException:
            self.close()
            raise
        self.load_seconds = time.perf_counter() - started

    def __enter__(self) -> "Model":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the threads and closes the file. The model can't be used any more."""
        if self._team is not None:
            self._team.close()
        self.file.close()

    @property
    def n_threads(self) -> int:
        """Threads at work."""
        assert self._team is not None
        return self._team.n_threads

    @property
    def hooks(self) -> "dict[str, Hook]":
        """Functions that see, and may replace, values during runs: by the name of a node of the graph (`Model.graph`),
        called as hook(name, value) with float32 (n_tokens, …); what one returns, if not None, replaces the value."""
        return self.sequence.hooks

    @property
    def metadata(self) -> Any:
        """The file's metadata, a mapping."""
        return self.file.metadata

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, rebuilt from the file's metadata."""
        return Tokenizer.from_metadata(self.file.metadata)

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        """The file's chat template, if it has one."""
        source = self.file.get("tokenizer.chat_template", str, default="")
        if not source:
            return None

        def text(token: int | None) -> str:
            return "" if token is None else self.tokenizer.token_bytes(token).decode(errors="replace")

        return ChatTemplate(source, text(self.tokenizer.bos), text(self.tokenizer.eos))

    def tokenize(self, text: str, special: bool = True, bos: bool | None = None) -> list[int]:
        """Token ids of a text.

        Parameters
        ----------
        text : str
        special : bool
            Whether control tokens written out in the text, such as <|im_end|>, are taken as such.
        bos : bool, optional
            Whether the beginning-of-sequence token comes first; by default as the file says.
        """
        return self.tokenizer.encode(text, special=special, bos=bos)

    def detokenize(self, ids: Sequence[int], special: bool = True) -> str:
        """The text of token ids; control tokens are written out if `special`."""
        return self.tokenizer.decode(ids, special=special)

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """The logits after each of `ids`, as a sequence of its own.

        Returns
        -------
        float32 array (n_tokens, n_vocab)

        Raises
        ------
        ContextFullError
            More tokens than the context holds.
        """
        self.sequence.keep(0)
        ids = [int(i) for i in ids]
        out = np.empty((len(ids), self.architecture.n_vocab), np.float32)
        at = 0
        for piece in self.sequence.extend_all(ids):
            out[at : at + len(piece)] = piece
            at += len(piece)
        return out

    def graph(self, n_tokens: int = 1, logits: str = "last") -> Graph:
        """The compute graph for up to n_tokens tokens, to look at; see `ggpy.graph`."""
        return build_graph(self.file, self.architecture, n_tokens, logits)  # type: ignore[arg-type]

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = None,
        temperature: float = 0.8,
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
    ) -> "Generation":
        """Continues a prompt.

        Parameters
        ----------
        prompt : str or sequence of int
            Text or token ids. What it shares with the sequence before it isn't computed again.
        max_tokens : int, optional
            Tokens at most; by default until the model ends or the context is full.
        temperature : float
            0 takes the likeliest token each time.
        top_k, top_p, min_p, repetition_penalty : int, float, float, float
            See `sampling.Sampler`; 0, 1, 0 and 1 switch them off.
        seed : int, optional
            The same seed gives the same text.
        stop : sequence of str
            Texts that end the generation; they are not part of it.

        Returns
        -------
        Generation
            An iterator over pieces of text, each of whole characters. Leaving the loop cancels.

        Raises
        ------
        ContextFullError
            The prompt doesn't fit into the context.
        """
        sampler = Sampler(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        )
        ids = self.tokenize(prompt) if isinstance(prompt, str) else [int(i) for i in prompt]
        return Generation(self, ids, sampler, max_tokens, stop)


class Generation:
    """A running generation: iterate for its text.

    Attributes
    ----------
    prompt_ids, ids : list of int
        Tokens of the prompt, and those generated so far (an end token included).
    finish_reason : str or None
        "stop" (an end token or a stop text), "length" (max_tokens), "context" (no room left), "cancelled"; None while it
        goes on.
    n_reused : int
        Tokens of the prompt that were already in the cache.
    prompt_seconds, decode_seconds : float
        Time for the rest of the prompt, and for the tokens after the first.
    """

    def __init__(self, model: Model, prompt_ids: list[int], sampler: Sampler, max_tokens: int | None, stop: Sequence[str]):
        if not prompt_ids:
            raise Error("the prompt is empty")
        if len(prompt_ids) > model.n_ctx:
            raise ContextFullError(f"the prompt has {len(prompt_ids)} tokens, the context holds {model.n_ctx}")
        self._model, self._sampler, self._max_tokens, self._stop = model, sampler, max_tokens, stop
        self.prompt_ids = prompt_ids
        self.ids: list[int] = []
        self.finish_reason: str | None = None
        self.n_reused = 0
        self.prompt_seconds = self.decode_seconds = 0.0
        self._pieces = self._run()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def cancel(self) -> None:
        """Ends the generation before its next token."""
        self._pieces.close()
        self.finish_reason = self.finish_reason or "cancelled"

    @property
    def prompt_rate(self) -> float:
        """Tokens of the prompt per second."""
        return (len(self.prompt_ids) - self.n_reused) / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Generated tokens per second, without the first, which comes from the prompt's run."""
        return (len(self.ids) - 1) / self.decode_seconds if self.decode_seconds and len(self.ids) > 1 else 0.0

    def _run(self) -> Generator[str, None, None]:
        model, sequence = self._model, self._model.sequence
        tokenizer = model.tokenizer
        decoder, stops = StreamDecoder(tokenizer, self.prompt_ids), StopMatcher(self._stop)
        if self._max_tokens is not None and self._max_tokens < 1:
            self.finish_reason = "length"
            return
        started = time.perf_counter()
        self.n_reused = sequence.reuse(self.prompt_ids)
        logits = sequence.extend(self.prompt_ids[self.n_reused :])
        self.prompt_seconds = time.perf_counter() - started
        started = time.perf_counter()
        while True:
            token = self._sampler.sample(logits, sequence.ids)
            self.ids.append(token)
            if token in tokenizer.end_tokens:
                self.finish_reason = "stop"
                break
            text, stopped = stops.push(decoder.push(token))
            if text:
                yield text
            if stopped:
                self.finish_reason = "stop"
                return
            if len(self.ids) == self._max_tokens:
                self.finish_reason = "length"
                break
            if len(sequence.ids) == sequence.n_ctx:
                self.finish_reason = "context"
                break
            logits = sequence.extend([token])
            self.decode_seconds = time.perf_counter() - started
        text, _ = stops.push(decoder.flush())
        text += stops.flush()
        if text:
            yield text
