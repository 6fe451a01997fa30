"""What is answered at each path."""

import asyncio
import base64
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import date
from typing import Any, TypeVar

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from ..errors import Error
from ..generate.fields import Field, format_options, options_of, read
from ..generate.generation import Generation
from . import fields, messages, responses
from .answers import Answer, Usage, usage_of
from .chat import ChatWriter, conversation_of
from .completions import CompletionWriter, continuations, gap_ids, prompt_ids, prompts_of
from .conversation import Conversation, Plain, Prompt, replies
from .engine import Stream
from .errors import APIError, invalid, refused
from .guard import Limits
from .metrics import Metrics
from .models import Models, Served
from .native import NativeWriter, WatchedSampler, watched
from .page import page
from .transport import JSON, Events, body_of, connected, events, whole
from .writer import FINGERPRINT, Writer

T = TypeVar("T")


class Server:
    """The endpoints.

    Parameters
    ----------
    models : Models
    limits : Limits
    defaults : mapping
        Options of generations for requests that don't say otherwise.
    template_kwargs : mapping, optional
        What chat templates are told where requests don't say otherwise.
    """

    def __init__(
        self, models: Models, limits: Limits, defaults: Mapping[str, Any], template_kwargs: Mapping[str, Any] | None = None
    ):
        self.models, self.limits, self.defaults = models, limits, dict(defaults)
        self.template_kwargs = dict(template_kwargs or {})
        self.metrics = Metrics()

    # What endpoints share

    async def read(self, request: Request, table: Mapping[str, Field]) -> dict[str, Any]:
        """The known fields of a request, checked."""
        return read(await body_of(request, self.limits.body), table)

    def options(self, values: Mapping[str, Any], table: Mapping[str, Field], served: Served) -> dict[str, Any]:
        """The options of a request's generations."""
        options = {**self.defaults, **options_of(values, table, served.model.tokenizer.encode_inside)}
        if values.get("ignore_eos"):
            ends = dict.fromkeys(served.model.tokenizer.end_tokens, float("-inf"))
            options["logit_bias"] = {**options.get("logit_bias", {}), **ends}
        return options

    def prompt(self, served: Served, conversation: Conversation, constrained: bool = False) -> Prompt:
        """The prompt of a conversation."""
        today = {"date_string": date.today().strftime("%d %b %Y")}  # Llama 3's templates know a day of 2024 otherwise
        kwargs = {**today, **self.template_kwargs, **conversation.template_kwargs}
        return Prompt(served.model, replace(conversation, template_kwargs=kwargs), constrained)

    def _reply(
        self, served: Served, conversation: Conversation, options: Mapping[str, Any], n: int
    ) -> tuple[Prompt, list[Generation]]:
        constrained = any(options.get(name) is not None for name in ("json_schema", "regex", "grammar"))
        prompt = self.prompt(served, conversation, constrained)
        return prompt, replies(served.model, prompt, options, n)

    async def answer(
        self,
        request: Request,
        values: Mapping[str, Any],
        begin: Callable[[Served], tuple[list[Generation], Callable[[list[Generation]], tuple[Writer, list[Answer]]]]],
        each: int = 1,
        n_prompts: int = 1,
    ) -> Response:
        """Answers a request for text: whole, or as events.

        Parameters
        ----------
        begin : callable
            Begins the generations, in another thread; gives them, and what makes a writer and answers of them.
        each, n_prompts : int
            How many answers there are to each of so many prompts.

        Raises
        ------
        APIError
            Too many answers are wanted already, or the request isn't understood.
        """
        async with AsyncExitStack() as stack:
            served = await stack.enter_async_context(self.models.use(values.get("model")))
            self._admit(served, each * n_prompts, stack)
            try:
                generations, written = await asyncio.to_thread(begin, served)
            except Error as error:
                raise refused(error) from None
            writer, answers = written(generations)
            progress = values.get("stream", False) and values.get("return_progress", False)
            stream = Stream(served.engine, generations, self.limits.seconds, progress)
            stack.callback(stream.close)
            stack.callback(lambda: self.metrics.answered(usage_of(answers, n_prompts), answers))
            request.state.usage = lambda: usage_of(answers, n_prompts)
            if values.get("stream"):
                timings = values.get("timings_per_token", False)
                return Events(events(stream, writer, answers, n_prompts, timings), stack.pop_all())
            return JSON(await connected(request, whole(stream, writer, answers, n_prompts)))
        raise AssertionError  # the stack hides no errors

    def _admit(self, served: Served, n: int, stack: AsyncExitStack) -> None:
        """Lets n more answers in, until the stack is left; where there are too many, only when nobody else is there."""
        most = served.model._scheduler.most + self.limits.max_queue
        if served.n_answers and served.n_answers + n > most:
            raise APIError(429, f"{served.n_answers} answers are under way; try again", headers={"Retry-After": "5"})
        served.n_answers += n

        def leave() -> None:
            served.n_answers -= n

        stack.callback(leave)

    # OpenAI's API

    async def chat_completions(self, request: Request) -> Response:
        """POST /v1/chat/completions"""
        values = await self.read(request, fields.CHAT)
        conversation = conversation_of(values)
        more = format_options(values.get("response_format"))
        wanted = values.get("logprobs", False)
        if wanted:
            more["logprobs"] = values.get("top_logprobs", 0)
        elif "top_logprobs" in values:
            raise invalid("top_logprobs needs logprobs", "top_logprobs")
        with_usage = _with_usage(values)

        def begin(served: Served) -> Any:
            options = {**self.options(values, fields.CHAT, served), **more}
            prompt, generations = self._reply(served, conversation, options, values.get("n", 1))

            def written(generations: list[Generation]) -> tuple[Writer, list[Answer]]:
                answers = [Answer(g, prompt.parser(bool(values.get("stream")))) for g in generations]
                tokenizer = served.model.tokenizer
                return ChatWriter(served.name, answers, tokenizer, wanted, with_usage), answers

            return generations, written

        return await self.answer(request, values, begin, values.get("n", 1))

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions"""
        values = await self.read(request, fields.COMPLETION)
        if "prompt" not in values:
            raise invalid("prompt is required", "prompt")
        prompts = prompts_of(values["prompt"])
        n, echo = values.get("n", 1), values.get("echo", False)
        each = max(n, values.get("best_of", n))
        if each > n and values.get("stream"):
            raise invalid("best_of can't be streamed", "best_of")
        if values.get("suffix") and (len(prompts) > 1 or not isinstance(prompts[0], str)):
            raise invalid("suffix goes with one prompt, a text", "suffix")
        more = format_options(values.get("response_format"))
        wanted = "logprobs" in values
        if wanted or each > n:
            more["logprobs"] = values.get("logprobs", 0)

        def begin(served: Served) -> Any:
            options = {**self.options(values, fields.COMPLETION, served), **more}
            model, texts = served.model, prompts
            if values.get("suffix"):
                texts = [gap_ids(model, str(prompts[0]), values["suffix"])]
            # OpenAI's API ends completions after 16 tokens unless asked for more.
            generations = continuations(model, texts, {"max_tokens": 16, **options}, each, echo)
            for i, generation in enumerate(generations):
                generation.index, generation.choice = divmod(i, each)

            def written(generations: list[Generation]) -> tuple[Writer, list[Answer]]:
                answers = [Answer(g, Plain()) for g in generations]
                best = n if each > n else 0
                writer = CompletionWriter(served.name, answers, model.tokenizer, wanted, _with_usage(values), best)
                return writer, answers

            return generations, written

        return await self.answer(request, values, begin, each, len(prompts))

    async def responses(self, request: Request) -> Response:
        """POST /v1/responses"""
        values = await self.read(request, fields.RESPONSES)
        conversation, more = responses.conversation_of(values), responses.options_of(values)

        def writer(served: Served, answer: Answer) -> Writer:
            return responses.ResponsesWriter(served.name, answer, values)

        return await self._answer_to(request, values, fields.RESPONSES, conversation, more, writer)

    async def input_tokens(self, request: Request) -> Response:
        """POST /v1/chat/completions/input_tokens"""
        values = await self.read(request, fields.CHAT)
        return await self._counted(request, values, conversation_of(values), "chat.completion.input_tokens")

    async def response_input_tokens(self, request: Request) -> Response:
        """POST /v1/responses/input_tokens"""
        values = await self.read(request, fields.RESPONSES)
        return await self._counted(request, values, responses.conversation_of(values), "response.input_tokens")

    async def _counted(
        self, request: Request, values: Mapping[str, Any], conversation: Conversation, kind: str = ""
    ) -> Response:
        """How many tokens a conversation has."""

        def count(served: Served) -> int:
            return len(served.model.tokenizer.encode_prompt(self.prompt(served, conversation).text))

        return JSON({**({"object": kind} if kind else {}), "input_tokens": await self.computed(request, values, count)})

    # Anthropic's API

    async def messages(self, request: Request) -> Response:
        """POST /v1/messages"""
        values = await self.read(request, fields.MESSAGES)
        if "max_tokens" not in values:
            raise invalid("max_tokens is required", "max_tokens")
        conversation = messages.conversation_of(values)

        def writer(served: Served, answer: Answer) -> Writer:
            return messages.MessagesWriter(served.name, answer)

        return await self._answer_to(request, values, fields.MESSAGES, conversation, {}, writer)

    async def count_tokens(self, request: Request) -> Response:
        """POST /v1/messages/count_tokens"""
        values = await self.read(request, fields.MESSAGES)
        return await self._counted(request, values, messages.conversation_of(values))

    async def _answer_to(
        self,
        request: Request,
        values: Mapping[str, Any],
        table: Mapping[str, Field],
        conversation: Conversation,
        more: Mapping[str, Any],
        writer: Callable[[Served, Answer], Writer],
    ) -> Response:
        """Answers a conversation once."""

        def begin(served: Served) -> Any:
            options = {**self.options(values, table, served), **more}
            prompt, generations = self._reply(served, conversation, options, 1)

            def written(generations: list[Generation]) -> tuple[Writer, list[Answer]]:
                answer = Answer(generations[0], prompt.parser(bool(values.get("stream"))))
                return writer(served, answer), [answer]

            return generations, written

        return await self.answer(request, values, begin)

    # llama.cpp's API

    async def native_completion(self, request: Request) -> Response:
        """POST /completion"""
        values = await self.read(request, fields.NATIVE)
        if "prompt" not in values:
            raise invalid("prompt is required", "prompt")
        prompts = prompts_of(values["prompt"])
        return await self._continue(request, values, lambda served: prompts, len(prompts))

    async def infill(self, request: Request) -> Response:
        """POST /infill"""
        values = await self.read(request, fields.INFILL)
        if "input_prefix" not in values or "input_suffix" not in values:
            raise invalid("input_prefix and input_suffix are required", "input_prefix")
        files = [(x.get("filename", ""), x.get("text")) for x in values.get("input_extra", ())]
        if not all(isinstance(name, str) and isinstance(text, str) for name, text in files):
            raise invalid("input_extra: each has a text, and a filename that is a text", "input_extra")
        extra = "".join(f"{name}\n{text}\n" for name, text in files)
        before = values["input_prefix"] + values.get("prompt", "")
        return await self._continue(
            request, values, lambda served: [gap_ids(served.model, before, values["input_suffix"], extra)]
        )

    async def _continue(
        self,
        request: Request,
        values: Mapping[str, Any],
        prompts: Callable[[Served], Sequence[str | list[int | str]]],
        n_prompts: int = 1,
    ) -> Response:
        def begin(served: Served) -> Any:
            options = self.options(values, fields.INFILL, served)
            n_probs = values.get("n_probs", 0)
            samplers: list[WatchedSampler] = []

            def watch(options: dict[str, Any]) -> dict[str, Any]:
                options, sampler = watched(served.model, options, n_probs)
                samplers.append(sampler)
                return options

            if n_probs and values.get("post_sampling_probs"):
                generations = continuations(served.model, prompts(served), options, change=watch)
            else:
                more = {"logprobs": n_probs} if n_probs else {}
                generations = continuations(served.model, prompts(served), {**options, **more})
            for i, generation in enumerate(generations):
                generation.index, generation.choice = i, 0

            def written(generations: list[Generation]) -> tuple[Writer, list[Answer]]:
                answers = [Answer(generation, Plain()) for generation in generations]
                writer = NativeWriter(served.name, answers, served.model.tokenizer, options, values, samplers)
                return writer, answers

            return generations, written

        return await self.answer(request, values, begin, 1, n_prompts)

    # Vectors

    async def embeddings(self, request: Request) -> Response:
        """POST /v1/embeddings"""
        values = await self.read(request, fields.EMBEDDINGS)
        given = values.get("input", values.get("content"))
        if given is None:
            raise invalid("input is required", "input")
        texts = prompts_of(given)
        size = values.get("dimensions")

        def embed(served: Served) -> dict[str, Any]:
            model = served.model
            n_embd = model.architecture.n_embd
            if size is not None and size > n_embd:
                raise invalid(f"dimensions must be {n_embd} or less", "dimensions")
            tokenizer = model.tokenizer
            ids = [tokenizer.encode(text) if isinstance(text, str) else prompt_ids(tokenizer, text) for text in texts]
            vectors = model.embed(ids)[:, :size]
            if size is not None:
                vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
            coded = values.get("encoding_format") == "base64"
            data = [base64.b64encode(v.astype("<f4").tobytes()).decode() if coded else v.tolist() for v in vectors]
            return {
                "object": "list",
                "model": served.name,
                "data": [{"object": "embedding", "index": i, "embedding": v} for i, v in enumerate(data)],
                "usage": self._evaluated(request, sum(map(len, ids))),
            }

        return JSON(await connected(request, self.computed(request, values, embed)))

    def _evaluated(self, request: Request, n: int) -> dict[str, int]:
        """Counts the tokens of texts that aren't gone on with; the usage that the answer states."""
        usage = Usage(n, 0, 0, 0)
        self.metrics.answered(usage, ())
        request.state.usage = lambda: usage
        return {"prompt_tokens": n, "total_tokens": n}

    async def rerank(self, request: Request) -> Response:
        """POST /v1/rerank"""
        values = await self.read(request, fields.RERANK)
        given = values.get("documents", values.get("texts"))
        if "query" not in values or given is None:
            raise invalid("query and documents are required", "query" if "query" not in values else "documents")
        texts = [document if isinstance(document, str) else document.get("text") for document in given]
        if not all(isinstance(text, str) for text in texts):
            raise invalid("documents are texts, or objects with a text", "documents")

        def rank(served: Served) -> Any:
            model = served.model
            scores = model.rerank(values["query"], texts).tolist()
            n = sum(len(model.tokenizer.encode(text)) for text in [values["query"], *texts])
            usage = self._evaluated(request, n)
            best = sorted(range(len(texts)), key=lambda i: -scores[i])[: values.get("top_n", len(texts))]
            if "texts" in values:  # as Text Embeddings Inference has it
                with_text = values.get("return_text", False)
                return [{"index": i, "score": scores[i], **({"text": texts[i]} if with_text else {})} for i in best]
            with_text = values.get("return_documents", False)
            results = [
                {"index": i, "relevance_score": scores[i], **({"document": {"text": texts[i]}} if with_text else {})}
                for i in best
            ]
            return {"object": "list", "model": served.name, "results": results, "usage": usage}

        return JSON(await connected(request, self.computed(request, values, rank)))

    # What is there

    async def list_models(self, request: Request) -> Response:
        """GET /v1/models"""
        data = [self._model_facts(served) for served in self.models.served.values()]
        return JSON({"object": "list", "data": data, "models": [{**d, "name": d["id"]} for d in data]})

    async def one_model(self, request: Request) -> Response:
        """GET /v1/models/NAME"""
        name = request.path_params["name"]
        if name not in self.models.served:
            raise APIError(404, f"no model {name!r}", param="model", code="model_not_found")
        return JSON(self._model_facts(self.models.served[name]))

    def _model_facts(self, served: Served) -> dict[str, Any]:
        facts: dict[str, Any] = {"id": served.name, "object": "model", "created": served.created, "owned_by": "ggpy"}
        if served.is_loaded:
            model = served.model
            facts["meta"] = {
                "n_ctx": model.n_ctx,
                "n_ctx_train": model.architecture.n_ctx_train,
                "n_embd": model.architecture.n_embd,
                "n_vocab": model.architecture.n_vocab,
                "n_expert": model.n_expert,
                "size": served.path.stat().st_size,
            }
            facts["max_model_len"] = model.n_ctx
        return facts

    # Others

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize"""
        values = await self.read(request, fields.TOKENIZE)

        def tokens(served: Served) -> dict[str, Any]:
            model = served.model
            if "messages" in values:
                ids = model.tokenizer.encode_prompt(self.prompt(served, conversation_of(values)).text)
            else:
                text = values.get("content", values.get("prompt"))
                if text is None:
                    raise invalid("content, prompt or messages is required", "content")
                bos = None if values.get("add_special", "prompt" in values) else False
                ids = model.tokenizer.encode(text, special=values.get("parse_special", True), bos=bos)
            facts: dict[str, Any] = {"tokens": ids, "count": len(ids), "max_model_len": model.n_ctx}
            if values.get("with_pieces"):
                data = [model.tokenizer.token_bytes(i) for i in ids]
                facts["tokens"] = [{"id": i, "piece": _text_or_bytes(d)} for i, d in zip(ids, data, strict=True)]
            return facts

        return JSON(await self.computed(request, values, tokens))

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize"""
        values = await self.read(request, fields.DETOKENIZE)
        ids = values.get("tokens")
        if ids is None:
            raise invalid("tokens is required", "tokens")
        text = await self.computed(request, values, lambda served: served.model.detokenize(ids))
        return JSON({"content": text, "prompt": text})

    async def apply_template(self, request: Request) -> Response:
        """POST /apply-template"""
        values = await self.read(request, fields.CHAT)
        conversation = conversation_of(values)
        text = await self.computed(request, values, lambda served: self.prompt(served, conversation).text)
        return JSON({"prompt": text})

    async def computed(self, request: Request, values: Mapping[str, Any], work: Callable[[Served], T]) -> T:
        """What a function gives for the request's model, in another thread."""
        async with self.models.use(values.get("model")) as served:
            try:
                return await asyncio.to_thread(work, served)
            except Error as error:
                raise refused(error) from None
        raise AssertionError  # use() hides no errors

    async def props(self, request: Request) -> Response:
        """GET /props"""

        def facts(served: Served) -> dict[str, Any]:
            model = served.model
            template = model.chat_template
            params = {"n_predict": self.defaults.get("max_tokens", -1), **self.defaults}
            return {
                "default_generation_settings": {"n_ctx": model.n_ctx, "params": params},
                "total_slots": model._scheduler.most,
                "model_alias": served.name,
                "model_path": str(served.path),
                "modalities": {"vision": False, "audio": False},
                "chat_template": template.source if template is not None else "",
                "build_info": FINGERPRINT,
            }

        return JSON(await self.computed(request, {"model": request.query_params.get("model")}, facts))

    async def slots(self, request: Request) -> Response:
        """GET /slots"""

        def facts(served: Served) -> list[dict[str, Any]]:
            n_busy, n_ctx = served.n_answers, served.model.n_ctx
            most = served.model._scheduler.most
            return [{"id": i, "n_ctx": n_ctx, "is_processing": i < n_busy} for i in range(most)]

        return JSON(await self.computed(request, {"model": request.query_params.get("model")}, facts))

    async def experts(self, request: Request) -> Response:
        """GET /experts"""
        name = request.query_params.get("model")

        def watched(served: Served) -> dict[str, Any]:
            watch = served.model.watch_experts()
            return {
                "layers": watch.layers,
                "n_expert_used": watch.n_expert_used,
                "counts": watch.counts.tolist(),
            }

        return JSON(await self.computed(request, {"model": name}, watched))

    async def metrics_text(self, request: Request) -> Response:
        """GET /metrics"""
        self.metrics.answers.set(sum(served.n_answers for served in self.models.served.values()))
        return Response(self.metrics.text(), headers=self.metrics.headers)

    async def page(self, request: Request) -> Response:
        """GET /"""
        return page()

    async def health(self, request: Request) -> Response:
        """GET /health"""
        self.models.check_started()
        return JSON({"status": "ok"})


def _with_usage(values: Mapping[str, Any]) -> bool:
    return bool(values.get("stream_options", {}).get("include_usage", False))


def _text_or_bytes(data: bytes) -> str | list[int]:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return list(data)
