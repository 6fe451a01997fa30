"""What goes wrong with a request, in the shape that its API's clients read."""

from typing import Any

from ..errors import ContextFullError, Error
from ..generate.fields import FieldError

#: error types by status, as OpenAI's API names them
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "unavailable_error",
}


class APIError(Exception):
    """A request that is refused or fails.

    Parameters
    ----------
    status : int
    message : str
    type : str, optional
        By default what belongs to the status.
    param : str, optional
        The field of the request that is wrong.
    headers : mapping of str to str, optional
    **more
        Further keys of the error.
    """

    def __init__(
        self,
        status: int,
        message: str,
        type: str = "",
        param: str | None = None,
        headers: dict[str, str] | None = None,
        **more: Any,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.headers = status, message, param, headers or {}
        self.type = type or _TYPES.get(status, "invalid_request_error")
        self.more = more

    def openai(self) -> dict[str, Any]:
        """The answer's body, as OpenAI has it."""
        code = self.more.get("code", self.type if self.type not in _TYPES.values() else self.status)
        return {"error": {"message": self.message, "type": self.type, "param": self.param, **self.more, "code": code}}

    def anthropic(self) -> dict[str, Any]:
        """The answer's body, as Anthropic has it."""
        names = {"server_error": "api_error", "unavailable_error": "overloaded_error"}
        known = self.type in _TYPES.values() or self.type == "invalid_request_error"
        kind = names.get(self.type, self.type if known else "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": self.message}}


def invalid(message: str, param: str | None = None) -> APIError:
    """The error of a field that isn't what it must be."""
    return APIError(400, message, param=param)


def too_long(n_prompt: int, n_ctx: int) -> APIError:
    """The error of a prompt that doesn't fit, in words and by a code that clients know: they shorten the conversation."""
    return APIError(
        400,
        f"prompt is too long: {n_prompt} tokens > {n_ctx} maximum; it exceeds the available context size",
        "exceed_context_size_error",
        n_prompt_tokens=n_prompt,
        n_ctx=n_ctx,
        code="context_length_exceeded",
    )


def refused(error: Error) -> APIError:
    """What ggpy refuses before it begins is the client's mistake."""
    return invalid(str(error), error.name if isinstance(error, FieldError) else None)


def failed(error: Error) -> APIError:
    """What fails on the way is the server's, or its memory's."""
    if isinstance(error, ContextFullError):
        return APIError(503, str(error), headers={"Retry-After": "5"})
    return APIError(500, str(error))
