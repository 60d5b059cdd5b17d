"""What probes and Prometheus ask, without a key. `/health` is `/health/ready` by another name."""

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from forebay_api.context import Running

router = APIRouter()


@router.get("/health/live", tags=["health"])
async def live(context: Running) -> dict[str, str]:
    """The process answers."""
    return {"status": "live"}


@router.get("/health", include_in_schema=False)
@router.get(
    "/health/ready", tags=["health"], responses={503: {"description": "Not ready", "content": {"application/json": {}}}}
)
async def ready(context: Running) -> Response:
    """Requests can be taken: NATS is connected, and the api is not shutting down.

    Workers are listed but not required: without one, requests wait in the queue.
    """
    connected = context.connection.connected
    ok = connected and not context.draining
    body: dict[str, Any] = {
        "status": "ready" if ok else "draining" if context.draining else "not_ready",
        "nats": "connected" if connected else "disconnected",
        "workers": [
            {"id": worker.id, "model": worker.model, "status": worker.status.value, "progress": worker.progress}
            for worker in context.workers.alive()
        ],
    }
    return JSONResponse(body, 200 if ok else 503)


@router.get("/metrics", tags=["metrics"], response_class=Response)
async def get_metrics(request: Request, context: Running) -> Response:
    """What all processes of this api measured, and the gauges of the queue."""
    if context.exposition is None:
        return Response("METRICS is false\n", 404, media_type="text/plain")
    body, content_type = await context.exposition.render(request.headers.get("accept", ""))
    return Response(body, headers={"content-type": content_type})
