"""Requests' bodies come in, answers go out: whole, or as events while they are generated."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import AsyncExitStack
from typing import Any, TypeVar

import anyio
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from ..errors import Error
from .answers import Answer, usage_of
from .engine import Stream
from .errors import APIError, failed, invalid
from .writer import Progress, Writer, timings_of

_log = logging.getLogger("ggpy.server")
T = TypeVar("T")

_BODY_SECONDS = 60.0  # in which a body must have come
#: seconds without an event, after which a comment is sent
KEEP_ALIVE = 10.0


async def body_of(request: Request, most: int) -> dict[str, Any]:
    """The JSON object of a request of so many bytes at most.

    Raises
    ------
    APIError
        It is too long, takes too long, or is no JSON object.
    """
    data = bytearray()
    try:
        with anyio.fail_after(_BODY_SECONDS):
            async for chunk in request.stream():
                data += chunk
                if len(data) > most:
                    raise APIError(413, f"a request may have {most} bytes")
    except TimeoutError:
        raise APIError(408, f"the request didn't come within {_BODY_SECONDS:.0f} s") from None
    try:
        body = json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise invalid("the request's body isn't JSON") from None
    if not isinstance(body, dict):
        raise invalid("the request's body must be a JSON object")
    return body


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


class JSON(JSONResponse):
    """A body in JSON, escaped: texts may have halves of characters."""

    def render(self, content: Any) -> bytes:
        """The body."""
        return json.dumps(content, separators=(",", ":")).encode()


def error_response(path: str, error: APIError) -> Response:
    """An error in the words of the path's API."""
    body = error.anthropic() if path.startswith("/v1/messages") else error.openai()
    return JSON(body, error.status, error.headers)


class Events(StreamingResponse):
    """Events as they come, and comments while none do. What ends it early ends the answers."""

    def __init__(self, events: AsyncIterator[str], stack: AsyncExitStack):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(_kept_alive(events), headers=headers, media_type="text/event-stream")
        self._stack = stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends them; what was in use is given back in any case."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await self._stack.aclose()


async def _kept_alive(events: AsyncIterator[str]) -> AsyncIterator[str]:
    while True:
        task = asyncio.ensure_future(anext(events))
        try:
            while not (await asyncio.wait({task}, timeout=KEEP_ALIVE))[0]:
                yield ": still at work\n\n"
            yield task.result()
        except StopAsyncIteration:
            return
        finally:
            task.cancel()


def _written(event: str | None, data: Mapping[str, Any]) -> str:
    return (f"event: {event}\n" if event else "") + f"data: {json.dumps(data, separators=(',', ':'))}\n\n"


async def connected(request: Request, work: Awaitable[T]) -> T:
    """The result of some work; gives it up when the client leaves.

    Raises
    ------
    ClientDisconnect
        It has left.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_leaving(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


async def _leaving(request: Request) -> None:
    """Returns when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def events(
    stream: Stream, writer: Writer, answers: list[Answer], n_prompts: int, with_timings: bool
) -> AsyncIterator[str]:
    """The events of a request's answers, as they are sent; with llama.cpp's `timings_per_token`, if it is asked for."""
    for event in writer.start():
        yield _written(*event)
    progress = Progress(writer, answers, with_timings) if stream.with_progress else None
    try:
        async for index, pieces, ended in stream:
            made = progress.take(index) if progress is not None else []
            new = writer.take(index, answers[index].take(pieces, ended)) + (writer.end(index) if ended else [])
            if new and with_timings:
                new[-1][1]["timings"] = timings_of(answers[index])
            if made or new:
                yield "".join(_written(*event) for event in made + new)
    except Exception as error:
        for event in writer.failed(_as_api_error(error)):
            yield _written(*event)
        return
    last = writer.finish(usage_of(answers, n_prompts))
    if last and with_timings:
        last[-1][1]["timings"] = timings_of(answers[0])
    yield "".join(_written(*event) for event in last) + writer.after


async def whole(stream: Stream, writer: Writer, answers: list[Answer], n_prompts: int) -> dict[str, Any]:
    """A request's answers when all are whole.

    Raises
    ------
    APIError
        One failed.
    """
    try:
        async for index, pieces, ended in stream:
            answers[index].take(pieces, ended)
    except Error as error:
        raise failed(error) from None
    return writer.whole(usage_of(answers, n_prompts))


def _as_api_error(error: Exception) -> APIError:
    if isinstance(error, Error):
        return failed(error)
    _log.error("an answer failed", exc_info=error)
    return APIError(500, "internal error")
