"""`/`: the page that shows the queue. Static files of this package, and nothing from anywhere else."""

import functools
from pathlib import Path

from fastapi import APIRouter, HTTPException
from starlette.responses import Response

HEADERS = {
    "content-security-policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "referrer-policy": "no-referrer",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",
}
"""The page runs its own script alone, and no other page may hold it in a frame."""

PARTS = {
    "app.js": "text/javascript",
    "common.js": "text/javascript",
    "queue.js": "text/javascript",
    "requests.js": "text/javascript",
    "chat.js": "text/javascript",
    "style.css": "text/css",
    "icon.svg": "image/svg+xml",
}
"""The files that the page is made of, and nothing else of its folder."""

router = APIRouter(include_in_schema=False)


@router.get("/")
async def index() -> Response:
    """The page itself; what it shows, it asks for with the key of whoever looks at it."""
    return _file("index.html", "text/html")


@router.get("/page/{name}")
async def part(name: str) -> Response:
    """Its scripts, looks and icon."""
    if name not in PARTS:
        raise HTTPException(404, "there is no such file")
    return _file(name, PARTS[name])


def _file(name: str, media_type: str) -> Response:
    return Response(_content(name), media_type=media_type, headers=HEADERS)


@functools.cache
def _content(name: str) -> bytes:
    return (Path(__file__).parent / "static" / name).read_bytes()
