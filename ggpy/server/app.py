"""The application: which endpoint is at which path, and what becomes of errors."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from .. import __version__
from ..generate.fields import Field, FieldError
from . import fields
from .endpoints import Server
from .errors import APIError, refused
from .guard import Guard, Limits
from .models import Models, Served
from .transport import JSON, error_response

_log = logging.getLogger("ggpy.server")


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, APIError)
    return error_response(request.url.path, error)


async def _on_field_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, FieldError)
    return error_response(request.url.path, refused(error))


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = {404: f"nothing at {request.url.path}", 405: f"{request.method} is not for {request.url.path}"}
    made = APIError(error.status_code, words.get(error.status_code, error.detail), headers=dict(error.headers or {}))
    return error_response(request.url.path, made)


async def _on_error(request: Request, error: Exception) -> Response:
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)
    _log.error("a request failed", exc_info=error)
    return error_response(request.url.path, APIError(500, "internal error"))


class Endpoint(NamedTuple):
    """What is answered at a path: by which method of `Server`, and which fields requests may have."""

    method: str
    path: str
    name: str
    table: Mapping[str, Field] | None = None


ENDPOINTS = (
    Endpoint("POST", "/v1/chat/completions", "chat_completions", fields.CHAT),
    Endpoint("POST", "/v1/chat/completions/input_tokens", "input_tokens", fields.CHAT),
    Endpoint("POST", "/v1/completions", "completions", fields.COMPLETION),
    Endpoint("POST", "/v1/responses", "responses", fields.RESPONSES),
    Endpoint("POST", "/v1/responses/input_tokens", "response_input_tokens", fields.RESPONSES),
    Endpoint("POST", "/v1/messages", "messages", fields.MESSAGES),
    Endpoint("POST", "/v1/messages/count_tokens", "count_tokens", fields.MESSAGES),
    Endpoint("POST", "/v1/embeddings", "embeddings", fields.EMBEDDINGS),
    Endpoint("POST", "/v1/rerank", "rerank", fields.RERANK),
    Endpoint("GET", "/v1/models", "list_models"),
    Endpoint("GET", "/v1/models/{name:path}", "one_model"),
    # llama.cpp's, of which some are OpenAI's without the version
    Endpoint("POST", "/completion", "native_completion", fields.NATIVE),
    Endpoint("POST", "/completions", "native_completion", fields.NATIVE),
    Endpoint("POST", "/chat/completions", "chat_completions", fields.CHAT),
    Endpoint("POST", "/chat/completions/input_tokens", "input_tokens", fields.CHAT),
    Endpoint("POST", "/responses", "responses", fields.RESPONSES),
    Endpoint("POST", "/embeddings", "embeddings", fields.EMBEDDINGS),
    Endpoint("POST", "/rerank", "rerank", fields.RERANK),
    Endpoint("GET", "/models", "list_models"),
    Endpoint("POST", "/infill", "infill", fields.INFILL),
    Endpoint("POST", "/tokenize", "tokenize", fields.TOKENIZE),
    Endpoint("POST", "/detokenize", "detokenize", fields.DETOKENIZE),
    Endpoint("POST", "/apply-template", "apply_template", fields.CHAT),
    Endpoint("GET", "/props", "props"),
    Endpoint("GET", "/slots", "slots"),
    Endpoint("GET", "/experts", "experts"),
    Endpoint("GET", "/metrics", "metrics_text"),
    Endpoint("GET", "/health", "health"),
    Endpoint("GET", "/v1/health", "health"),
    Endpoint("GET", "/", "page"),
)
_PATHS = {endpoint.path for endpoint in ENDPOINTS}


def openapi() -> dict[str, Any]:
    """The API's description: what requests may have, from the tables that check them."""
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in ENDPOINTS:
        facts: dict[str, Any] = {"operationId": endpoint.name, "responses": {"200": {"description": "the answer"}}}
        if endpoint.table is not None:
            properties = {name: field.schema for name, field in endpoint.table.items()}
            schema = {"type": "object", "properties": properties}
            facts["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
        if "{" in endpoint.path:
            facts["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]
        paths.setdefault(endpoint.path.replace(":path", ""), {})[endpoint.method.lower()] = facts
    return {"openapi": "3.1.0", "info": {"title": "ggpy", "version": __version__}, "paths": paths}


def application(
    served: Sequence[Served],
    memory: int,
    limits: Limits,
    defaults: Mapping[str, Any],
    template_kwargs: Mapping[str, Any] | None = None,
    on_failure: Callable[[Exception], None] | None = None,
) -> Starlette:
    """The application, for any ASGI server. When it has started it loads the first model, and is unavailable (503) until
    that is done.

    Parameters
    ----------
    served : sequence of Served
    memory : int
        Bytes that loaded models may take.
    limits : Limits
    defaults : mapping
        Options of generations for requests that don't say otherwise.
    template_kwargs : mapping, optional
        What chat templates are told where requests don't say otherwise.
    on_failure : callable, optional
        Called if the first model can't be loaded.
    """
    server = Server(Models(served, memory), limits, defaults, template_kwargs)

    async def start() -> None:
        try:
            await server.models.start()
            _log.info("ready")
        except Exception as error:
            _log.error("the model can't be loaded: %s", error)
            if on_failure is not None:
                on_failure(error)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        starting = asyncio.create_task(start())
        await asyncio.sleep(0)  # it has begun before anybody can ask
        yield
        await starting
        await server.models.close()

    async def description(request: Request) -> Response:
        return JSON(openapi())

    routes = [Route(e.path, getattr(server, e.name), methods=[e.method]) for e in ENDPOINTS]
    routes.append(Route("/openapi.json", description, methods=["GET"]))
    handlers = {
        APIError: _on_api_error,
        FieldError: _on_field_error,
        HTTPException: _on_http_error,
        ClientDisconnect: _on_error,
        Exception: _on_error,
    }
    return Starlette(
        routes=routes,
        middleware=[Middleware(Guard, limits=limits, metrics=server.metrics, paths=_PATHS)],
        exception_handlers=handlers,  # type: ignore[arg-type]
        lifespan=lifespan,
    )
