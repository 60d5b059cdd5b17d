"""`/` and `/docs`: the page that shows the queue, and Swagger UI. They load no file from another server."""

import functools
from collections.abc import Awaitable, Callable
from importlib.resources import files

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

HEADERS = {
    # The page runs only scripts of its own, and no other page may frame it. The icons of Swagger UI are data URLs.
    "content-security-policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; "
    "form-action 'none'",
    "referrer-policy": "no-referrer",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",
}

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


def _route(package: str, name: str) -> Callable[[Request], Awaitable[Response]]:
    @functools.cache
    def content() -> bytes:
        return files(package).joinpath(name).read_bytes()

    async def serve(_: Request) -> Response:
        return Response(content(), media_type=MEDIA_TYPES[name.rsplit(".", 1)[1]], headers=HEADERS)

    return serve


for _path, _file in FILES.items():
    router.add_route(_path, _route(*_file), include_in_schema=False)
