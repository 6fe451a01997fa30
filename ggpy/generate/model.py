"""A model, ready to use: text in, text out."""

import reprlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, overload

import numpy as np

from ..errors import ContextFullError, Error
from ..file import GGUFFile
from ..graph import Graph, Team, default_threads
from ..models import read_architecture
from .chat import ChatTemplate
from .embedding import POOLINGS, embed, hidden_states, pooling_of
from .generation import Generation
from .options import checked_option, with_sampling_options
from .runner import Runner
from .sampling import StandardSampler
from .scheduler import Request, Scheduler
from .sequence import TokenSequence
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..graph import Batch, Hook
    from ..kernels.build import Progress
    from .embedding import Pooling
    from .expert_memory import ExpertMemory
    from .options import SamplingOptions
    from .sampling import Processor, Sampler

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
    kv_memory : int, optional
        Bytes for the cached keys and values of all sequences, at most; by default what four contexts take, but no more
        than a quarter of the machine's memory. What nobody uses is kept for prompts that begin alike, until the room is
        needed.
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
        kv_memory: int | None = None,
        ram_budget: int | None = None,
        progress: "Progress | None" = None,
    ):
        started = time.perf_counter()
        if (n_ctx is not None and n_ctx < 1) or n_batch < 1:
            raise Error(f"n_ctx and n_batch are at least 1, not {n_ctx} and {n_batch}")
        self.file = GGUFFile(path)
        team = None
        try:
            self.architecture = read_architecture(self.file, n_expert_used, mla)
            self.n_ctx = n_ctx or min(self.architecture.n_ctx_train, DEFAULT_CONTEXT)
            team = self._team = Team(n_threads or default_threads(), progress)
            how = (self.n_ctx, n_batch, kv_type.upper(), kv_memory, ram_budget, progress)
            self._runner = Runner(self.file, self.architecture, self._team, *how)
            self._scheduler = Scheduler(self._runner)
        except BaseException:
            if team is not None:
                team.close()
            self.file.close()
            raise
        self.load_seconds = time.perf_counter() - started

    def __enter__(self) -> "Model":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise Error(f"{self.file.path}: a model can't be pickled; open it in each process")

    def close(self) -> None:
        """Ends all generations and threads and closes the file, once a run of another thread has ended. The model can't be
        used any more."""
        if self._runner.closed or self._runner.is_elsewhere:
            return
        self._scheduler.close()
        self._runner.close()
        self._team.close()
        self.file.close()

    @property
    def n_threads(self) -> int:
        """Threads at work."""
        return self._team.n_threads

    @property
    def hooks(self) -> "dict[str, Hook]":
        """Functions that see, and may replace, values during runs: by the name of a node of the graph (`Model.graph`),
        called as hook(name, value) with float32 (n_tokens, …); what one returns, if not None, replaces the value.

        A run may have tokens of several sequences: `Model.batch` says whose."""
        return self._runner.hooks

    @contextmanager
    def hooked(self, hooks: "Mapping[str, Hook]") -> Iterator[None]:
        """Adds hooks while the block runs; those that they replace come back at its end. Other threads' runs see them."""
        added = dict(hooks)
        with self._runner.lock:
            replaced = {name: self.hooks[name] for name in added if name in self.hooks}
            self.hooks.update(added)
        try:
            yield
        finally:
            with self._runner.lock:
                for name in added:
                    if self.hooks.get(name) is added[name]:  # another thread may have set one since
                        del self.hooks[name]
                        self.hooks.update({name: replaced[name]} if name in replaced else {})

    @property
    def batch(self) -> "Batch | None":
        """For hooks: the tokens of the run that is under way, with their sequences and positions."""
        return self._runner.batch

    @property
    def expert_memory(self) -> "ExpertMemory | None":
        """What keeps the experts within `ram_budget`, if that was given."""
        return self._runner.expert_memory

    @property
    def kv_bytes(self) -> int:
        """Bytes that cached keys and values may take."""
        return self._runner.pages.n_bytes

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
        ids = [int(i) for i in ids]
        with self.new_sequence() as sequence:
            pieces = [piece.copy() for piece in sequence.extend_all(ids)]
        return np.concatenate(pieces) if pieces else np.empty((0, self.architecture.n_vocab), np.float32)

    def hidden_states(self, ids: Sequence[int], layers: Sequence[int] | None = None) -> np.ndarray:
        """What goes from layer to layer for each of `ids`, as a sequence of its own.

        Parameters
        ----------
        ids : sequence of int
        layers : sequence of int, optional
            0 is the embedding, which the first layer takes, i what layer i - 1 gives; the last, n_layer (or -1), after the
            final norm, as in transformers. By default all.

        Returns
        -------
        float32 array (n_layers, n_tokens, n_embd)

        Raises
        ------
        ContextFullError
            More tokens than the context holds.
        Error
            A layer that the model doesn't have, or what isn't a token.
        """
        n = self.architecture.n_layer + 1
        wanted = range(n) if layers is None else [int(i) for i in layers]
        for i in wanted:
            if not -n <= i < n:
                raise Error(f"hidden states of layer {i}; there are 0 to {n - 1}")
        return hidden_states(self._runner, _token_ids(ids), [i % n for i in wanted])

    @overload
    def embed(
        self,
        texts: "Iterable[str | Sequence[int]]",
        *,
        pooling: 'Literal["mean", "cls", "last"] | None' = None,
        normalize: bool = True,
    ) -> np.ndarray: ...
    @overload
    def embed(
        self, texts: "Iterable[str | Sequence[int]]", *, pooling: 'Literal["none"]', normalize: bool = True
    ) -> list[np.ndarray]: ...
    def embed(
        self,
        texts: "Iterable[str | Sequence[int]]",
        *,
        pooling: "Pooling | None" = None,
        normalize: bool = True,
    ) -> "np.ndarray | list[np.ndarray]":
        """Vectors of texts: what the last layer gives for their tokens, after the final norm, pooled.

        As many texts as fit are computed together, beside generations that are at work; each text's vector is the same
        bits whatever its company.

        Parameters
        ----------
        texts : iterable of (str or sequence of int)
            Texts, which get the tokens that the file puts around a text, or token ids, which are taken as they are. What
            models for retrieval want in front of queries or documents is the caller's to add.
        pooling : {"mean", "cls", "last", "none"}, optional
            The mean of a text's tokens, its first or its last; "none" leaves one vector a token. By default as the file
            says, or else as is usual for its architecture.
        normalize : bool
            Whether vectors are scaled to length 1, so that their products are cosines.

        Returns
        -------
        float32 array (n_texts, n_embd)
            With "none" a list instead: for each text, (n_tokens, n_embd).

        Raises
        ------
        ContextFullError
            A text is longer than the context: nothing is cut off.
        Error
            A text has no tokens, or is neither text nor token ids; pooling of another name.
        """
        if isinstance(texts, str):
            raise Error("embed takes a list of texts; for one: embed([text])")
        kind = pooling or pooling_of(self.file)
        if kind not in POOLINGS:
            raise Error(f"pooling {kind!r}; there are {', '.join(POOLINGS)}")
        self._runner.check()
        ids = [self.tokenizer.encode(t) if isinstance(t, str) else _token_ids(t) for t in texts]
        vectors = dict(embed(self._runner, self._scheduler, ids, kind, normalize))
        found = [vectors[i] for i in range(len(ids))]
        if kind == "none":
            return found
        return np.concatenate([np.empty((0, self.architecture.n_embd), np.float32), *found])

    def new_sequence(self) -> TokenSequence:
        """A sequence of tokens, to be evaluated step by step. There may be many, in different threads too."""
        return TokenSequence(self._runner)

    def load_sequence(self, path: str | Path) -> TokenSequence:
        """The sequence that `TokenSequence.save` wrote; going on with it gives the same bits as if it had never ended.

        Raises
        ------
        Error
            No such file, of another model, or of this one with another type of cached values or other options.
        """
        from .saved import load_sequence

        sequence = self.new_sequence()
        load_sequence(sequence, self._runner, Path(path))
        return sequence

    def graph(self, n_tokens: int = 1, n_outputs: int | None = None) -> Graph:
        """The compute graph for up to n_tokens tokens and the logits of n_outputs of them, by default of all, to look at;
        see `ggpy.graph`."""
        return self._runner.graph(n_tokens, n_outputs)

    @with_sampling_options
    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = None,
        stop: str | Sequence[str] | None = (),
        sampler: "Sampler | None" = None,
        processors: "Sequence[Processor]" = (),
        **sampling: "Unpack[SamplingOptions]",
    ) -> "Generation":
        """Continues a prompt.

        Several generations of a model go on together, in one thread or in many; each gives what it would give alone.

        Parameters
        ----------
        prompt : str or sequence of int
            Text or token ids. What it shares with sequences before it isn't computed again.
        max_tokens : int, optional
            Tokens at most; None or -1: until the model ends or the context is full.
        stop : str or sequence of str, optional
            Texts that end the generation; they are not part of it.
        sampler : Sampler, optional
            Chooses the tokens, by its `sample(logits, ids)`, instead of the options below. One that keeps a state is for
            one generation.
        processors : sequence of callable
            Called before the sampler, in turn, as f(ids, logits) with the ids so far, the prompt's among them, and float32
            logits (n_vocab,), a copy; each returns logits of the same shape. -inf rules a token out.
        **sampling

        Returns
        -------
        Generation
            An iterator over pieces of text, each of whole characters, for `for` and `async for`. Leaving the loop
            cancels, once nothing refers to it.

        Raises
        ------
        ContextFullError
            The prompt doesn't fit into the context.
        Error
            The prompt is empty or neither text nor token ids, or an option is out of its range.
        """
        self._runner.check()
        if sampler is None:
            tokenizer = self.tokenizer if sampling.get("dry_multiplier") else None
            standard = StandardSampler(tokenizer=tokenizer, **sampling)
            self._runner.check_ids(standard.options["logit_bias"])
            sampler = standard
        elif sampling:
            raise Error(f"give a sampler or sampling options, not both: {', '.join(sampling)}")
        elif not callable(getattr(sampler, "sample", None)):
            raise Error(f"a sampler has a method sample(logits, ids), {type(sampler).__name__} has none")
        if callable(processors) or not all(map(callable, processors := tuple(processors))):
            raise Error("processors are a list of functions, each called as f(ids, logits)")
        ids = self.tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else _token_ids(prompt)
        if not ids:
            raise Error("the prompt is empty")
        if len(ids) > self.n_ctx:
            raise ContextFullError(f"the prompt has {len(ids)} tokens, the context holds {self.n_ctx}")
        self._runner.check_ids(ids)
        request = Request(self.tokenizer, ids, sampler, _limit(max_tokens), () if stop is None else stop, processors)
        return Generation(self._scheduler, request)

    @with_sampling_options
    def generate_batch(
        self,
        prompts: Iterable[str | Sequence[int]],
        *,
        max_tokens: int | None = None,
        stop: str | Sequence[str] | None = (),
        sampler: "Callable[[int], Sampler] | None" = None,
        processors: "Sequence[Processor]" = (),
        **sampling: "Unpack[SamplingOptions]",
    ) -> Iterator[Generation]:
        """Continues many prompts, as many at once as is good.

        To have streams instead, call `generate` for each and iterate: they go on together all the same.

        Parameters
        ----------
        prompts : iterable of (str or sequence of int)
            Read as there is room for more. The prompt at place i is sampled with seed + i, if a seed is given.
        max_tokens, stop, processors
            As for `generate`.
        sampler : callable, optional
            Called with each prompt's place, gives its sampler.
        **sampling

        Yields
        ------
        Generation
            Each as it ends: `index` is its place among the prompts, `text` what was generated. Leaving the loop cancels
            those that haven't ended.

        Raises
        ------
        ContextFullError
            A prompt doesn't fit into the context, or all pages are in use. An error of one generation ends all.
        Error
            As for `generate`.
        """
        seed = checked_option("seed", sampling.pop("seed", None))
        todo, more = enumerate(prompts), True
        active: list[Generation] = []
        while more or active:
            room = self._scheduler.room - len(active)
            new = list(islice(todo, room))
            more = len(new) == room
            for index, prompt in new:
                if seed is not None:
                    sampling["seed"] = seed + index
                generation = self.generate(
                    prompt,
                    max_tokens=max_tokens,
                    stop=stop,
                    sampler=None if sampler is None else sampler(index),
                    processors=processors,
                    **sampling,
                )
                generation.index = index
                active.append(generation)
            if active:
                active[0].wait()
            ended = [g for g in active if g.take()]
            active = [g for g in active if g not in ended]
            yield from ended


def _token_ids(prompt: Sequence[int]) -> list[int]:
    ids = prompt.tolist() if isinstance(prompt, np.ndarray) else prompt
    if not isinstance(ids, (bytes, bytearray)) and isinstance(ids, Iterable):
        ids = list(ids)
        wrong = [i for i in ids if not isinstance(i, Integral) or isinstance(i, bool)]
        if not wrong:
            return [int(i) for i in ids]
        raise Error(f"a prompt is text or token ids; among these is {reprlib.repr(wrong[0])}")
    raise Error(f"a prompt is text or token ids, not {type(prompt).__name__}")


def _limit(max_tokens: int | None) -> int | None:
    """How many tokens at most; None if there is no limit."""
    if max_tokens is None:
        return None
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, Integral) or max_tokens < -1:
        raise Error(f"max_tokens must be a whole number, 0 or more, or None or -1 for no limit; got {max_tokens!r}")
    return None if max_tokens == -1 else int(max_tokens)
