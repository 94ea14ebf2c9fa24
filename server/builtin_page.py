"""The page at `/`: three plain files in server/page, read once. Knows paths and headers, not what the page does.

It is served without a key, as there is nothing secret in it; what it asks for needs one.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.resources import files

from fastapi import APIRouter
from starlette.responses import Response

# path: file and media type. The page asks for nothing from elsewhere, and the browser is told to hold it to that.
_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page/style.css": ("style.css", "text/css; charset=utf-8"),
    "/page/app.js": ("app.js", "text/javascript; charset=utf-8"),
}
PATHS = frozenset(_FILES)
_HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": "default-src 'self'; img-src data:; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def make_page_router() -> APIRouter:
    """GET of each file; not part of the API's description."""
    router = APIRouter(include_in_schema=False)
    for path, (name, media_type) in _FILES.items():
        content = files("server").joinpath("page", name).read_bytes()
        router.add_api_route(path, _endpoint(content, media_type), methods=["GET"], name=name)
    return router


def _endpoint(content: bytes, media_type: str) -> Callable[[], Awaitable[Response]]:
    async def endpoint() -> Response:
        return Response(content, headers={**_HEADERS, "content-type": media_type})

    return endpoint
