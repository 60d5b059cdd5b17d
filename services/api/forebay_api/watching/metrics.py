"""`GET /metrics`, for Prometheus, without a key."""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from forebay_api.context import Running

router = APIRouter(tags=["metrics"])


@router.get("/metrics", response_class=Response)
async def get_metrics(request: Request, context: Running) -> Response:
    """What all processes of this api measured, and the gauges of the queue."""
    if context.exposition is None:
        return Response("METRICS is false\n", 404, media_type="text/plain")
    body, content_type = await context.exposition.render(request.headers.get("accept", ""))
    return Response(body, headers={"content-type": content_type})
