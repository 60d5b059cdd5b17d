"""`/health/live` and `/health/ready`: for probes, open to all. `/health` is `/health/ready` by another name."""

from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from forebay_api.context import Running

router = APIRouter(prefix="/health", tags=["health"])


@router.get("/live")
async def live(context: Running) -> dict[str, str]:
    """The process answers."""
    return {"status": "live"}


@router.get("", include_in_schema=False)
@router.get("/ready", responses={503: {"description": "Not ready", "content": {"application/json": {}}}})
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
