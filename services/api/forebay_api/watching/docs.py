"""`/docs`: our operations in Swagger UI, whose files come from the package fastapi-offline and from no CDN."""

import functools
from importlib.resources import files

from fastapi import APIRouter
from starlette.responses import Response

from forebay_api.watching import page

HEADERS = page.HEADERS | {
    "content-security-policy": page.HEADERS["content-security-policy"] + "; img-src 'self' data:",
}
"""As the page has them; the icons in Swagger UI's style sheet are data URLs."""

router = APIRouter(include_in_schema=False)


@router.get("/docs")
async def index() -> Response:
    """The frame that Swagger UI fills."""
    return _file("forebay_api.watching", "static/docs.html", "text/html")


@router.get("/docs/start.js")
async def start() -> Response:
    """Starts Swagger UI on /openapi.json; a file, since the page may run no script of its own text."""
    return _file("forebay_api.watching", "static/docs.js", "text/javascript")


@router.get("/docs/swagger-ui.js")
async def script() -> Response:
    """Swagger UI itself."""
    return _file("fastapi_offline", "static/swagger-ui-bundle.js", "text/javascript")


@router.get("/docs/swagger-ui.css")
async def style() -> Response:
    """Its looks."""
    return _file("fastapi_offline", "static/swagger-ui.css", "text/css")


def _file(package: str, name: str, media_type: str) -> Response:
    return Response(_content(package, name), media_type=media_type, headers=HEADERS)


@functools.cache
def _content(package: str, name: str) -> bytes:
    return files(package).joinpath(name).read_bytes()
