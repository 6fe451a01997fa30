"""The page to talk to, and what a browser lets it do."""

import base64
import hashlib
import re
from functools import lru_cache
from importlib.resources import files

from starlette.responses import HTMLResponse


@lru_cache
def page() -> HTMLResponse:
    """The page. It may use its own script and style alone, takes nothing from elsewhere, and is in nobody's frame."""
    text = (files(__package__) / "page.html").read_text("utf-8")
    policy = f"""default-src 'none'; connect-src 'self'; img-src data:; script-src {_own(text, "script")};
        style-src {_own(text, "style")}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"""
    headers = {
        "Content-Security-Policy": " ".join(policy.split()),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }
    return HTMLResponse(text, headers=headers)


def _own(text: str, tag: str) -> str:
    """What allows the element of that name, by its digest."""
    found = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    assert found
    return f"'sha256-{base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()}'"
