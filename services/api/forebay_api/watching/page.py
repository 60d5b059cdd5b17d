"""`/` and `/docs`: the page that shows the queue, and Swagger UI. They load no file from another server."""

import functools
from collections.abc import Awaitable, Callable, Mapping
from importlib.resources import files

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

FILES = {
    "/": ("forebay_api.watching", "static/index.html"),
    **{
        f"/page/{name}": ("forebay_api.watching", f"static/{name}")
        for name in ("app.js", "common.js", "queue.js", "requests.js", "chat.js", "style.css", "icon.svg")
    },
    "/docs": ("forebay_api.watching", "static/docs.html"),
    "/docs/start.js": ("forebay_api.watching", "static/docs.js"),
    "/docs/swagger-ui.js": ("fastapi_offline", "static/swagger-ui-bundle.js"),
    "/docs/swagger-ui.css": ("fastapi_offline", "static/swagger-ui.css"),
}
"""For each path, the package and the name of its file."""

MEDIA_TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}

router = APIRouter()


def _route(package: str, name: str, headers: Mapping[str, str]) -> Callable[[Request], Awaitable[Response]]:
    @functools.cache
    def content() -> bytes:
        return files(package).joinpath(name).read_bytes()

    async def serve(_: Request) -> Response:
        return Response(content(), media_type=MEDIA_TYPES[name.rsplit(".", 1)[1]], headers=headers)

    return serve


for _path, _file in FILES.items():
    _headers = DOCS_HEADERS if _path.startswith("/docs") else HEADERS
    router.add_route(_path, _route(*_file, _headers), include_in_schema=False)
