"""`/` and `/docs`: the page that shows the queue, and Swagger UI. They load no file from another server."""

import functools
from collections.abc import Awaitable, Callable, Mapping
from importlib.resources import files
from importlib.resources.abc import Traversable

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

POLICY = "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
"""The pages run only scripts of their own, and no other page may frame them."""

HEADERS = {
    "content-security-policy": POLICY,
    "referrer-policy": "no-referrer",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",
}
# The icons in Swagger UI's style sheet are data URLs.
DOCS_HEADERS = HEADERS | {"content-security-policy": f"{POLICY}; img-src 'self' data:"}

_OURS, _SWAGGER = (files(package) / "static" for package in ("forebay_api.watching", "fastapi_offline"))
# fmt: off
_PAGE = (
    "app.js", "common.js", "hour.js", "plots.js", "rows.js", "overview.js", "requests.js", "request.js", "models.js",
    "batches.js", "usage.js", "chat.js", "style.css", "icon.svg", "uplot.js", "uplot.css", "uplot.LICENSE",
)
# fmt: on
FILES = {
    "/": _OURS / "index.html",
    **{f"/page/{name}": _OURS / name for name in _PAGE},
    "/docs": _OURS / "docs.html",
    "/docs/start.js": _OURS / "docs.js",
    "/docs/swagger-ui.js": _SWAGGER / "swagger-ui-bundle.js",
    "/docs/swagger-ui.css": _SWAGGER / "swagger-ui.css",
}
"""The file of each path."""

MEDIA_TYPES = {
    "html": "text/html",
    "js": "text/javascript",
    "css": "text/css",
    "svg": "image/svg+xml",
    "LICENSE": "text/plain",
}

router = APIRouter()


def _route(file: Traversable, headers: Mapping[str, str]) -> Callable[[Request], Awaitable[Response]]:
    content = functools.cache(file.read_bytes)

    async def serve(_: Request) -> Response:
        return Response(content(), media_type=MEDIA_TYPES[file.name.rsplit(".", 1)[1]], headers=headers)

    return serve


for _path, _file in FILES.items():
    _headers = DOCS_HEADERS if _path.startswith("/docs") else HEADERS
    router.add_route(_path, _route(_file, _headers), include_in_schema=False)
