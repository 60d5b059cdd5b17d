"""`/health/live` and `/health/ready`: for probes, open to all."""

from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from forebay_api.context import Open

router = APIRouter(prefix="/health", tags=["health"])


@router.get("/live")
async def live(context: Open) -> dict[str, str]:
    """The process answers."""
    return {"status": "live"}


@router.get("/ready")
async def ready(context: Open) -> Response:
    """Requests can be taken: NATS is connected. An api that drains has closed its port already.

    Workers are told of but not needed for it: without one, requests wait in the queue.
    """
    ok = context.connection.connected
    body: dict[str, Any] = {
        "status": "ready" if ok else "not_ready",
        "nats": "connected" if ok else "disconnected",
        "workers": [
            {"id": worker.id, "model": worker.model, "status": worker.status.value, "progress": worker.progress}
            for worker in context.workers.alive()
        ],
    }
    return JSONResponse(body, 200 if ok else 503)
