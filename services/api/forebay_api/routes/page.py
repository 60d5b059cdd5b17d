"""`/`: the page that shows the queue. Static files of this package, and nothing from anywhere else."""

import functools
from pathlib import Path

from fastapi import APIRouter
from starlette.responses import Response

HEADERS = {
    "content-security-policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "referrer-policy": "no-referrer",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",
}
"""The page runs its own script alone, and no other page may hold it in a frame."""

router = APIRouter(include_in_schema=False)


@router.get("/")
async def index() -> Response:
    """The page itself; what it shows, it asks for with the key of whoever looks at it."""
    return _file("index.html", "text/html")


@router.get("/page/app.js")
async def script() -> Response:
    """Its script."""
    return _file("app.js", "text/javascript")


@router.get("/page/style.css")
async def style() -> Response:
    """Its looks."""
    return _file("style.css", "text/css")


@router.get("/page/icon.svg")
async def icon() -> Response:
    """Its icon."""
    return _file("icon.svg", "image/svg+xml")


def _file(name: str, media_type: str) -> Response:
    return Response(_content(name), media_type=media_type, headers=HEADERS)


@functools.cache
def _content(name: str) -> bytes:
    return (Path(__file__).parents[1] / "page" / name).read_bytes()
