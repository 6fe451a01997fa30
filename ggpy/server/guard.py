"""What stands before the endpoints: who may ask, and the log of what was asked."""

import hmac
import ipaddress
import logging
import re
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .answers import new_id
from .errors import APIError
from .metrics import Metrics
from .transport import error_response

_log = logging.getLogger("ggpy.server")

_PUBLIC = ("/", "/health", "/v1/health")  # what needs no key
_POLLED = ("/health", "/v1/health", "/metrics")  # what supervisors ask all the time: not worth a line, unless refused


@dataclass(frozen=True)
class Limits:
    """What clients may do.

    Attributes
    ----------
    api_key : str
        What they must show; empty: nothing.
    max_queue : int
        Answers that may wait, beside those that are at work.
    seconds : float
        That an answer may take.
    body : int
        Bytes of a request.
    hosts : sequence of str
        Names under which the server may be asked, beside localhost and IP addresses.
    """

    api_key: str = ""
    max_queue: int = 64
    seconds: float = 3600.0
    body: int = 16 << 20
    hosts: Sequence[str] = ()


class Guard:
    """Refuses requests under other hosts' names, of other hosts' pages, and without the key; logs what was asked.

    A page from anywhere can let its host's name point to this machine and so have a browser ask us: the name in `Host`
    shows it. An IP address can't be pointed elsewhere.
    """

    def __init__(self, app: ASGIApp, limits: Limits, metrics: Metrics, paths: Collection[str]):
        self._app, self._limits, self._metrics, self._paths = app, limits, metrics, paths
        self._key = limits.api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get("x-request-id", "")
        request_id = given if re.fullmatch(r"[\w.-]{1,64}", given) else new_id("req_")
        started, status = time.perf_counter(), 0

        async def answered(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        scope["state"] = {**scope.get("state", {}), "request_id": request_id}
        error = self._refusal(scope["path"], headers)
        try:
            if error is not None:
                await error_response(scope["path"], error)(scope, receive, answered)
            else:
                await self._app(scope, receive, answered)
        finally:
            self._write_log(scope, request_id, status, time.perf_counter() - started)

    def _refusal(self, path: str, headers: Mapping[str, str]) -> APIError | None:
        host = _host_name(headers.get("host", ""))
        if not _is_own(host, self._limits.hosts):
            return APIError(403, f"this server is not {host!r}: ask it by its address, or start it with --allowed-host")
        origin = headers.get("origin", "")
        if origin.startswith(("http://", "https://")) and urlsplit(origin).netloc != headers.get("host"):
            return APIError(403, "pages of other servers may not use this one")
        if self._key and path not in _PUBLIC:
            shown = headers.get("x-api-key") or re.sub(r"^bearer\s+", "", headers.get("authorization", ""), flags=re.I)
            if not hmac.compare_digest(shown.encode("latin-1"), self._key):
                return APIError(401, "the API key is missing or wrong", code="invalid_api_key")
        if int(headers.get("content-length", "0")) > self._limits.body:
            return APIError(413, f"a request may have {self._limits.body} bytes")
        return None

    def _write_log(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        facts: dict[str, Any] = {
            "id": request_id,
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "seconds": round(seconds, 3),
        }
        if (usage := scope["state"].get("usage")) is not None:
            facts |= usage()._asdict()
        self._metrics.request(scope["path"] if scope["path"] in self._paths else "other", status, seconds)
        level = logging.DEBUG if scope["path"] in _POLLED and status in (200, 503) else logging.INFO
        _log.log(level, "request", extra={"facts": facts})


def _host_name(host: str) -> str:
    """The name in a `Host`, without the port."""
    return host[1 : host.find("]")] if host.startswith("[") else host.partition(":")[0]


def _is_own(host: str, allowed: Sequence[str]) -> bool:
    if not host or host == "localhost" or host.endswith(".localhost") or host in allowed:
        return True
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
