"""`GET /v1/models`: what can be asked for."""

from typing import Any

from fastapi import APIRouter

from forebay_api.context import Authorized
from forebay_contracts.messages import WorkerInfo

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("")
async def list_models(context: Authorized) -> dict[str, Any]:
    """Every served model."""
    served = context.models.served()
    return {"object": "list", "data": [_model(name, worker) for name, worker in served.items()]}


@router.get("/{name:path}")
async def retrieve_model(name: str, context: Authorized) -> dict[str, Any]:
    """One model, by its name or an alias."""
    model = context.models.resolve(name)
    return _model(model, context.models.served().get(model))


def _model(name: str, worker: WorkerInfo | None) -> dict[str, Any]:
    """OpenAI's model object, then what a live worker says of it."""
    return {
        "id": name,
        "object": "model",
        "created": int(worker.started_at) if worker else 0,
        "owned_by": "forebay",
        "status": worker.status.value if worker else "no_worker",
        "aliases": list(worker.aliases) if worker else [],
        "context_length": worker.context_length if worker else None,
        "quantization": worker.quantization if worker else None,
    }
