"""A model, ready to use: text in, text out."""

import reprlib
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from itertools import count, islice
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, cast, overload

import numpy as np

from ..errors import ContextFullError, Error, UnsupportedError
from ..file import GGUFFile
from ..graph import Graph, Team, default_threads
from ..models import added_up, read_architecture, read_nextn
from ..pipeline import Processes, RemotePages, Stages, split_layers
from ..pipeline.stage import How
from .chat import ChatTemplate
from .embedding import POOLINGS, embed, hidden_states, pooling_of, projections_of
from .generation import Generation
from .memory import MemoryUse, memory_use
from .options import ChatOptions, Drafter, GenerationOptions, JSONSchema, Processor, Sampler, checked_option, with_options
from .page_files import PageFiles
from .ranking import Ranker, pair_of, rerank
from .replies import Family, ReplyParser, calls_schema, family_of
from .request import Request
from .runner import Runner
from .sampling import StandardSampler
from .saved import digest
from .scheduler import Scheduler
from .score import Score
from .sequence import TokenSequence
from .session import Message, Reply, Session, checked_messages
from .speculation import MOST, DraftModel, Lookup, NextTokens
from .streaming import StreamDecoder
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..graph import Batch, Hook
    from ..kernels.build import Progress
    from ..models import ThinPair
    from .constraints import CallsConstraint, Constraints
    from .embedding import Pooling
    from .expert_memory import ExpertMemory
    from .experts import ExpertWatch
    from .options import SamplingOptions

DEFAULT_CONTEXT = 8192
DEFAULT_BATCH = 512


class Model:
    """A GGUF file opened for running.

    Made by `ggpy.load`, which says what the parameters are; adapters are given as `ggpy.hub.adapters` reads them.
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
        stages: int = 1,
        ray: str | None = None,
        lora: "Iterable[Mapping[str, ThinPair]]" = (),
        progress: "Progress | None" = None,
    ):
        started = time.perf_counter()
        if (n_ctx is not None and n_ctx < 1) or n_batch < 1:
            raise Error(f"n_ctx and n_batch are at least 1, not {n_ctx} and {n_batch}")
        self.file = GGUFFile(path)
        team = None
        try:
            self._how_read = (n_expert_used, mla, n_ctx or DEFAULT_CONTEXT)
            self.architecture = read_architecture(self.file, *self._how_read)
            self.n_ctx = n_ctx or min(self.architecture.n_ctx_train, DEFAULT_CONTEXT)
            team = self._team = Team(n_threads or default_threads(), progress)
            how = (self.n_ctx, n_batch, kv_type.upper(), kv_memory, ram_budget, progress)
            make = None
            adapters = added_up(lora)
            if stages != 1 or ray is not None:
                if adapters:
                    raise UnsupportedError(f"{self.file.path}: adapters aren't shared by several stages; merge them")
                options = (n_expert_used, mla, kv_type.upper(), n_threads)
                make = partial(_stages, _count("stages", stages, 1), options, ray)
            self._runner = Runner(self.file, self.architecture, self._team, *how, make, adapters)
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
        if "_nextn" in vars(self):
            self._nextn.close()
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

    def watch_experts(self) -> "ExpertWatch":
        """Counts the experts that are at work from the first call on.

        Raises
        ------
        UnsupportedError
            The model has no experts.
        """
        from .experts import ExpertWatch

        with self._runner.lock:
            if self._runner.expert_watch is None:
                self._runner.expert_watch = ExpertWatch(self.graph(), str(self.file.path))
            return self._runner.expert_watch

    @property
    def kv_bytes(self) -> int:
        """Bytes that cached keys and values, and states, may take."""
        return self._runner.pages.n_bytes + self._runner.pages.states.n_bytes

    @property
    def room(self) -> int:
        """How many generations are worth having at once."""
        return self._scheduler.room

    @cached_property
    def digest(self) -> str:
        """What tells the model, opened as it is, from others: a hash of its metadata and of parts of its tensors."""
        return digest(self._runner)

    def check(self) -> None:
        """Raises Error if the model can't be used: it is closed, or belongs to another process."""
        self._runner.check()

    def memory_use(self, kv_type: str | None = None) -> MemoryUse:
        """The memory that the model will have taken once a context is full, within about 10 %; by parts.

        Parameters
        ----------
        kv_type : {"f16", "q8_0", "f32"}, optional
            What it would be with another type of cached keys and values.
        """
        type = kv_type or self._runner.pages.type
        return memory_use(self.file, self.architecture, self.n_ctx, self.n_threads, self._runner.n_batch, type)

    @cached_property
    def n_expert(self) -> int:
        """Experts of each layer that has any; 0 if none has."""
        return next((t.inputs[0].shape[1] for t in self.graph() if t.op == "ROUTE"), 0)

    @property
    def metadata(self) -> Any:
        """The file's metadata, a mapping."""
        return self.file.metadata

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, rebuilt from the file's metadata."""
        return Tokenizer.from_metadata(self.file.metadata)

    @cached_property
    def _constraints(self) -> "Constraints":
        from .constraints import Constraints

        return Constraints(self.tokenizer, self.architecture.n_vocab)

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        """The file's chat template, if it has one."""
        source = self.file.get("tokenizer.chat_template", str, default="")
        if not source:
            return None

        def text(token: int | None) -> str:
            return "" if token is None else self.tokenizer.token_bytes(token).decode(errors="replace")

        tool_use = self.file.get("tokenizer.chat_template.tool_use", str, default="")
        ids = {
            f"{name}_token": self.file.get(f"tokenizer.ggml.{key}_token_id", int, default=None)
            for name, key in (("pad", "padding"), ("unk", "unknown"))
        }
        more = {name: text(token) for name, token in ids.items() if token is not None and token < self.tokenizer.n_vocab}
        return ChatTemplate(source, text(self.tokenizer.bos), text(self.tokenizer.eos), tool_use, more)

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
        self._runner.check()
        kind = pooling or pooling_of(self.file, self._runner.is_encoder)
        if kind == "rank" and pooling is None:
            raise Error(f"{self.file.path}: a reranker, which gives scores: see Model.rerank")
        if kind not in POOLINGS:
            raise Error(f"pooling {kind!r}; there are {', '.join(POOLINGS)}")
        ids = [self.tokenizer.encode(t) if isinstance(t, str) else _token_ids(t) for t in texts]
        for tokens in ids:
            self._runner.check_ids(tokens)
        vectors = dict(embed(self._runner, self._scheduler, ids, kind, normalize, self._projections))
        found = [vectors[i] for i in range(len(ids))]
        if kind == "none":
            return found
        n_embd = len(self._projections[-1]) if self._projections else self.architecture.n_embd
        return np.concatenate([np.empty((0, n_embd), np.float32), *found])

    @cached_property
    def _projections(self) -> list[np.ndarray]:
        return projections_of(self.file, self.architecture.n_embd)

    def rerank(self, query: str, documents: Iterable[str]) -> np.ndarray:
        """How well documents answer a query, by a model made for that, which reads both together.

        As many documents as fit are computed together, beside generations that are at work; each one's score is the same
        bits whatever its company.

        Parameters
        ----------
        query : str
        documents : iterable of str
            Names of control tokens in texts stay text.

        Returns
        -------
        float32 array (n_documents,)
            The more, the better. What the model's head gives: for most models a logit, whose sigmoid is a probability; for
            those that say yes or no, as Qwen3-Reranker does, the probability of yes.

        Raises
        ------
        ContextFullError
            Query and document together are longer than the context: nothing is cut off.
        UnsupportedError
            The file has no head that scores, or says of a decoder not how it reads a query and a document.
        Error
            `documents` is a single text, or something isn't a text.
        """
        texts = [query] if isinstance(documents, str) else [query, *documents]
        if isinstance(documents, str) or not all(isinstance(text, str) for text in texts):
            raise Error("rerank takes a text and a list of texts: rerank(query, [document])")
        self._runner.check()
        ranker = self._ranker
        pairs = [pair_of(self.file, self._runner, self.tokenizer, query, document) for document in texts[1:]]
        return rerank(self._runner, self._scheduler, ranker, pairs)

    @cached_property
    def _ranker(self) -> Ranker:
        return Ranker(self.file, self.architecture.n_embd, self._runner.is_encoder)

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

    def save_cache(self, path: str | Path, prompt: str | Sequence[int]) -> None:
        """Writes a prompt's keys and values to a file, so that another process need not compute them.

        Parameters
        ----------
        path : str or Path
        prompt : str or sequence of int
            What of it isn't known is computed now.

        Raises
        ------
        ContextFullError
            The prompt doesn't fit into the context.
        Error
            The prompt is neither text nor token ids; the model has hooks; the file can't be written.
        """
        self._runner.check()
        ids = self._prompt_ids(prompt)
        with self._scheduler.recall(self._request(ids)) as sequence:
            if len(ids) > len(sequence):
                sequence.extend(ids[len(sequence) :])
            sequence.save(path)

    def load_cache(self, path: str | Path) -> None:
        """Knows the keys and values that `save_cache` or `TokenSequence.save` wrote: prompts that begin alike take what
        they have in common, for the same bits as without. They make room when others need it, as all that is known.

        Models with states go on from the file's end or, where a prompt differs before it, take nothing.

        Raises
        ------
        ContextFullError
            More tokens than the context holds.
        Error
            No such file, of another model, or of this one with another type of cached values or other options; the model
            has hooks.
        """
        with self.load_sequence(path) as sequence:
            self._scheduler.remember(sequence)

    def keep_cache(self, folder: str | Path, n_bytes: int = 4 << 30) -> None:
        """Keeps in a folder, from now on, what generations compute of keys and values, and of states; and takes from there
        what is known of their prompts, for the same bits as without. `close` waits until all is written.

        Parameters
        ----------
        folder : str or Path
            It is made if need be. It may serve several models, and processes.
        n_bytes : int
            What its files may take together; those used longest ago make room. Damaged ones are removed.

        Raises
        ------
        Error
            The folder can't be made.
        """
        self._runner.check()
        files = PageFiles(self._runner, Path(folder), n_bytes)
        with self._runner.lock:
            before, self._scheduler.files = self._scheduler.files, files
        if before is not None:
            before.close()

    def graph(self, n_tokens: int = 1, n_outputs: int | None = None) -> Graph:
        """The compute graph for up to n_tokens tokens and the logits of n_outputs of them, by default of all, to look at;
        see `ggpy.graph`."""
        return self._runner.graph(n_tokens, n_outputs)

    @with_options(GenerationOptions)
    def generate(
        self, prompt: str | Sequence[int], *, echo: bool = False, **options: "Unpack[GenerationOptions]"
    ) -> Generation:
        """Continues a prompt.

        Several generations of a model go on together, in one thread or in many; each gives what it would give alone.

        Parameters
        ----------
        prompt : str or sequence of int
            Text or token ids. What it shares with sequences before it isn't computed again.
        echo : bool
            The prompt's own tokens come first, as pieces; with `logprobs`, they have theirs.
        **options

        Returns
        -------
        Generation
            An iterator over `Piece`, a `str` for each token, of whole characters, for `for` and `async for`. Leaving the
            loop cancels, once nothing refers to it.

        Raises
        ------
        ContextFullError
            The prompt doesn't fit into the context.
        Error
            The prompt is empty or neither text nor token ids, or an option is out of its range.
        """
        self._runner.check()
        return Generation(self._scheduler, self._request(self._prompt_ids(prompt), 0 if echo else None, **options))

    def _prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        return self.tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else _token_ids(prompt)

    def _request(
        self,
        ids: list[int],
        echo_from: int | None = None,
        shown: Collection[int] = (),
        *,
        max_tokens: int | None = None,
        stop: str | Sequence[str] | None = (),
        logprobs: int | None = None,
        sampler: Sampler | None = None,
        processors: Sequence[Processor] = (),
        json_schema: JSONSchema | None = None,
        regex: str | None = None,
        grammar: str | None = None,
        lookup: bool | int = False,
        draft: "Model | Drafter | Literal['mtp'] | None" = None,
        **sampling: "Unpack[SamplingOptions]",
    ) -> Request:
        self._runner.check_logits()
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
        if not ids:
            raise Error("the prompt is empty")
        if len(ids) > self.n_ctx:
            raise ContextFullError(f"the prompt has {len(ids)} tokens, the context holds {self.n_ctx}")
        self._runner.check_ids(ids)
        if logprobs is not None:
            logprobs = _count("logprobs", logprobs, 0)
        stop = () if stop is None else stop
        constraint = None
        if not (json_schema is regex is grammar is None):
            constraint = self._constraints.constraint(json_schema, regex, grammar)
        how = (processors, logprobs, echo_from, constraint)
        request = Request(self.tokenizer, ids, sampler, _limit(max_tokens), stop, *how, shown)
        request.drafter = self._drafter(lookup, draft)
        return request

    def _drafter(self, lookup: bool | int, draft: "Model | Drafter | Literal['mtp'] | None") -> Drafter | None:
        most = MOST if lookup is True else _count("lookup", int(lookup) if lookup is False else lookup, 0)
        if not most and draft is None:
            return None
        if draft is None:
            return Lookup(most)
        if most:
            raise Error("guesses come from lookup or from a draft, not from both")
        if draft == "mtp":
            weights = (t for t in self._nextn.graph(1) if t.op == "WEIGHT" and t.name != "token_embd.weight")
            cost = sum(t.attrs["weight"].n_bytes for t in weights) / self._weight_bytes
            return NextTokens(self._nextn, self.architecture.n_vocab, cost)
        if not isinstance(draft, Model):
            if not callable(getattr(draft, "propose", None)):
                name = repr(draft) if isinstance(draft, str) else type(draft).__name__
                raise Error(f"a draft is a model, 'mtp' or has a method propose(ids, most); {name} has none")
            return draft
        draft._runner.check()
        difference = draft.tokenizer.difference(self.tokenizer)
        if difference:
            raise Error(f"{draft.file.path}: not the vocabulary of {self.file.path}: {difference}")
        cost = draft._weight_bytes / self._weight_bytes
        return DraftModel(draft._runner, self.architecture.n_vocab, cost)

    @cached_property
    def _nextn(self) -> Runner:
        """Runs the file's layer that predicts further tokens. Raises UnsupportedError if it has none."""
        self._runner.check_hidden()
        arch = read_nextn(self.file, *self._how_read)
        return Runner(self.file, arch, self._team, self.n_ctx, self._runner.n_batch, self._runner.pages.type)

    @cached_property
    def _weight_bytes(self) -> int:
        return sum(tensor.n_bytes for tensor in self.file.tensors.values())

    @with_options(GenerationOptions)
    def generate_batch(
        self,
        prompts: Iterable[str | Sequence[int]],
        *,
        echo: bool = False,
        n: int = 1,
        best_of: int | None = None,
        samplers: Callable[[int], Sampler] | None = None,
        **options: "Unpack[GenerationOptions]",
    ) -> Iterator[Generation]:
        """Continues many prompts, as many at once as is good.

        To have streams instead, call `generate` for each and iterate: they go on together all the same.

        Parameters
        ----------
        prompts : iterable of (str or sequence of int)
            Read as there is room for more. The first generation of all is sampled with the seed, if one is given, the next
            with seed + 1, and so on; those of one prompt come one after the other.
        echo : bool
            As for `generate`.
        n : int
            Generations for each prompt.
        best_of : int, optional
            Makes this many for each prompt, n or more, and gives the n with the highest mean log-probability of their
            tokens, the best first.
        samplers : callable, optional
            Called with each generation's place in that order, gives its sampler.
        **options

        Yields
        ------
        Generation
            Each as it ends: `index` is its prompt's place among the prompts, `choice` its own among that prompt's, `text`
            what was generated. Leaving the loop cancels those that haven't ended.

        Raises
        ------
        ContextFullError
            A prompt doesn't fit into the context, or all pages are in use. An error of one generation ends all.
        Error
            As for `generate`.
        """
        seed = checked_option("seed", options.pop("seed", None))
        each = n = _count("n", n, 1)
        if best_of is not None:
            each = _count("best_of", best_of, n)
            options.setdefault("logprobs", 0)

        def generations() -> Iterator[Generation]:
            places = count()
            for index, prompt in enumerate(prompts):
                for choice in range(each):
                    place = next(places)
                    if seed is not None:
                        options["seed"] = seed + place
                    if samplers is not None:
                        options["sampler"] = samplers(place)
                    generation = self.generate(prompt, echo=echo, **options)
                    generation.index, generation.choice = index, choice
                    yield generation

        ended = self._ended(generations())
        return ended if best_of is None else _best(ended, each, n)

    def _ended(self, generations: Iterator[Generation]) -> Iterator[Generation]:
        """The generations as they end, as many at once as is good."""
        active: list[Generation] = []
        more = True
        while more or active:
            room = self.room - len(active)
            new = list(islice(generations, room))
            more = len(new) == room
            active += new
            if active:
                active[0].wait()
            ended = [g for g in active if g.take()]
            active = [g for g in active if g not in ended]
            yield from ended

    def score(self, prompt: str | Sequence[int], continuations: Sequence[str | Sequence[int]]) -> list[Score]:
        """How probable continuations of a prompt are; the prompt is computed once for all.

        Parameters
        ----------
        prompt : str or sequence of int
            If it has no tokens, the beginning-of-sequence token stands for it, or the end-of-sequence token where there is
            none.
        continuations : sequence of (str or sequence of int)
            Texts if the prompt is one; tokenized together with it, and white space at its end belongs to them. That is
            what evaluation harnesses do.

        Returns
        -------
        list of Score
            In the continuations' order.

        Raises
        ------
        ContextFullError
            Prompt and continuation don't fit into the context.
        Error
            A continuation has no tokens, or it or the prompt is neither text nor token ids.
        """
        return self.score_batch((prompt, continuation) for continuation in continuations)

    def score_batch(self, pairs: Iterable[tuple[str | Sequence[int], str | Sequence[int]]]) -> list[Score]:
        """How probable continuations of many prompts are, as many at once as is good.

        Parameters
        ----------
        pairs : iterable of (prompt, continuation)
            Texts or token ids; see `score`.

        Returns
        -------
        list of Score
            In the pairs' order.

        Raises
        ------
        ContextFullError, Error
            As for `score`.
        """
        self._runner.check()
        scores: dict[int, Score] = {}

        def generations() -> Iterator[Generation]:
            for index, (prompt, continuation) in enumerate(pairs):
                start, rest = self._pair(prompt, continuation)
                request = self._request(start + rest, len(start), max_tokens=0, logprobs=1, temperature=0)
                generation = Generation(self._scheduler, request)
                generation.index = index
                yield generation

        for generation in self._ended(generations()):
            scores[generation.index] = Score.of(generation.pieces)
        return [scores[index] for index in range(len(scores))]

    def _pair(self, prompt: str | Sequence[int], continuation: str | Sequence[int]) -> tuple[list[int], list[int]]:
        """The tokens of a prompt and of what follows."""
        if isinstance(prompt, str) != isinstance(continuation, str):
            raise Error("a prompt and its continuations are either all texts or all token ids")
        if isinstance(prompt, str) and isinstance(continuation, str):
            text = prompt.rstrip()
            continuation = prompt[len(text) :] + continuation
            start = self.tokenizer.encode_prompt(text)
            both = self.tokenizer.encode_prompt(text + continuation)
            rest = both[len(start) :]
        else:
            start, rest = _token_ids(prompt), _token_ids(continuation)  # type: ignore[arg-type]
        if not start:
            first = self.tokenizer.bos if self.tokenizer.bos is not None else self.tokenizer.eos
            if first is None:
                raise Error("the prompt is empty, and the model has no token that begins a text")
            start = [first]
        if not rest:
            raise Error(f"the continuation {reprlib.repr(continuation)} has no tokens")
        return start, rest

    # Conversations

    def chat_prompt(
        self,
        messages: Iterable[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The text that the model's chat template makes of a conversation, up to where the reply begins.

        Parameters
        ----------
        messages : iterable of mappings
            Each with `role` and `content`.
        tools : sequence of mappings, optional
            JSON schemas of functions that the model may ask for.
        chat_template_kwargs : mapping, optional
            Whatever else the model's template knows, such as enable_thinking=False.

        Raises
        ------
        UnsupportedError
            The file has no chat template.
        TokenizerError
            The template refuses the conversation, or fails.
        """
        template = self.chat_template
        if template is None:
            raise UnsupportedError(f"{self.file.path}: the file has no chat template")
        return template.render(checked_messages(messages), tools=tools, **(chat_template_kwargs or {}))

    @with_options(ChatOptions)
    def chat(self, messages: Iterable[Message], *, stream: bool = False, **options: "Unpack[ChatOptions]") -> Reply:
        """Replies to a conversation.

        Parameters
        ----------
        messages : iterable of mappings
            Each with `role` and `content`.
        stream : bool
            False: the reply is whole. True: iterate over it for its pieces.
        **options

        Returns
        -------
        Reply
            A generation that also has `answer`, `thinking`, `tool_calls` and `message`.

        Raises
        ------
        ContextFullError
            The conversation doesn't fit into the context.
        UnsupportedError
            The file has no chat template.
        TokenizerError
            The template refuses the conversation, or fails.
        Error
            As for `generate`.
        """
        reply = self._reply(messages, 0, **options)
        return reply if stream else reply.run()

    def session(self, messages: Iterable[Message] = (), *, drop_oldest: bool = False) -> Session:
        """A conversation that keeps its messages.

        Parameters
        ----------
        messages : iterable of mappings
            What it begins with, such as a system message.
        drop_oldest : bool
            When the context is full, drop the oldest messages after the system's instead of raising ContextFullError.
        """
        return Session(self, messages, drop_oldest)

    def _reply(
        self,
        messages: Iterable[Message],
        room: int,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: "Unpack[GenerationOptions]",
    ) -> Reply:
        """A reply; there must be room for so many of its tokens, if it may have them, or for a quarter of the context."""
        prompt = self.chat_prompt(messages, tools=tools, chat_template_kwargs=chat_template_kwargs)
        return self._reply_to(prompt, room, tools, **options)

    def _reply_to(
        self,
        prompt: str,
        room: int,
        tools: Sequence[Mapping[str, Any]] | None = None,
        family: Family | None = None,
        **options: "Unpack[GenerationOptions]",
    ) -> Reply:
        """A reply to a conversation that the template has written out; calls of tools in it are bound to their schemas."""
        self._runner.check()
        ids = self.tokenizer.encode_prompt(prompt)
        most = _limit(options.get("max_tokens"))
        room = min(room, self.n_ctx // 4, room if most is None else most)
        if len(ids) + room > self.n_ctx:
            left = f" and {room} for the reply" if room else ""
            raise ContextFullError(f"the conversation has {len(ids)} tokens{left}; the context holds {self.n_ctx}")
        own, shown = self._family
        family = family or own
        request = self._request(ids, shown=shown, **options)
        if tools and family.are_objects and request.constraint is None:
            request.constraint = self._calls_constraint(tools, ReplyParser(family, tools, prompt), ids, shown)
        return Reply(self._scheduler, request, prompt, family, None if tools is None else list(tools))

    def _calls_constraint(
        self, tools: Sequence[Mapping[str, Any]], parser: ReplyParser, ids: list[int], shown: Collection[int]
    ) -> "CallsConstraint":
        from .constraints import CallsConstraint

        decoder, ends = StreamDecoder(self.tokenizer, ids, shown=shown), self.tokenizer.end_tokens
        return CallsConstraint(parser, decoder, ends, lambda begun: self._constraints.call(calls_schema(tools), begun))

    @cached_property
    def _family(self) -> tuple[Family, frozenset[int]]:
        """How the model marks thoughts and calls, and which control tokens are such marks."""
        template = self.chat_template
        sources = [] if template is None else [template.source, template.tool_use.source if template.tool_use else ""]
        family = family_of("".join(sources))
        encoded = [self.tokenizer.encode(mark, bos=False) for mark in family.tokens]
        return family, frozenset(ids[0] for ids in encoded if len(ids) == 1 and self.tokenizer.is_hidden(ids[0]))


def _stages(n: int, options: tuple[int | None, str, str, int | None], ray: str | None, runner: Runner) -> Stages:
    """A pipeline of n processes, by default with as many threads together as one would have."""
    (n_expert_used, mla, kv_type, n_threads), file = options, runner.file
    layers = split_layers(file, runner.arch.n_layer, n)
    n_threads = n_threads or max(1, default_threads() // n)
    pages = cast(RemotePages, runner.pages)
    n_slots = pages.states.n_slots + runner.has_states
    model = (n_expert_used, mla, runner.n_ctx, runner.n_batch, runner.n_outputs, kv_type, pages.n_pages, n_slots, n_threads)
    hows = [How(str(file.path), r, r.start == 0, r is layers[-1], *model) for r in layers]
    if ray is None:
        return Stages(Processes(hows), n, pages, runner.known)
    from ..pipeline.actors import Actors

    return Stages(Actors(ray, hows), n, pages, runner.known)


def _best(generations: Iterator[Generation], each: int, n: int) -> Iterator[Generation]:
    """Of each prompt's generations the n whose tokens are likeliest in the mean."""
    ended: dict[int, list[Generation]] = {}
    for generation in generations:
        of_prompt = ended.setdefault(generation.index, [])
        of_prompt.append(generation)
        if len(of_prompt) == each:
            del ended[generation.index]
            of_prompt.sort(key=lambda g: (-_mean_logprob(g), g.choice))
            for choice, best in enumerate(of_prompt[:n]):
                best.choice = choice
                yield best


def _mean_logprob(generation: Generation) -> float:
    generated = generation.pieces[-len(generation.ids) :] if generation.ids else []
    known = [piece.logprob for piece in generated if piece.logprob is not None]
    return sum(known) / len(known) if known else 0.0


def _token_ids(prompt: Sequence[int]) -> list[int]:
    ids = prompt.tolist() if isinstance(prompt, np.ndarray) else prompt
    if not isinstance(ids, (bytes, bytearray)) and isinstance(ids, Iterable):
        ids = list(ids)
        wrong = [i for i in ids if not isinstance(i, Integral) or isinstance(i, bool)]
        if not wrong:
            return [int(i) for i in ids]
        raise Error(f"a prompt is text or token ids; among these is {reprlib.repr(wrong[0])}")
    raise Error(f"a prompt is text or token ids, not {type(prompt).__name__}")


def _count(name: str, value: int, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise Error(f"{name} must be a whole number, {least} or more; got {reprlib.repr(value)}")
    return int(value)


def _limit(max_tokens: int | None) -> int | None:
    """How many tokens at most; None if there is no limit."""
    if max_tokens is None:
        return None
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, Integral) or max_tokens < -1:
        raise Error(f"max_tokens must be a whole number, 0 or more, or None or -1 for no limit; got {max_tokens!r}")
    return None if max_tokens == -1 else int(max_tokens)
