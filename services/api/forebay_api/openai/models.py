"""`GET /v1/models`: what can be asked for."""

from typing import Any

from fastapi import APIRouter

from forebay_api.context import Running
from forebay_api.watching.served_models import Asked
from forebay_contracts.wire import names
from forebay_contracts.wire.heartbeats import WorkerInfo, WorkerStatus

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("")
async def list_models(context: Running) -> dict[str, Any]:
    """What live workers serve, with the adapters that all of a model's have, and the default model."""
    models, found = context.models, []
    for model, workers in models.served().items():
        found += [
            _model(asked, workers) for asked in (Asked(model), *(Asked(model, one) for one in models.adapters(model)))
        ]
    return {"object": "list", "data": found}


@router.get("/{name:path}")
async def retrieve_model(name: str, context: Running) -> dict[str, Any]:
    """One model, by its name or an alias; also one that has no worker now. An adapter is MODEL:ADAPTER."""
    asked = await context.models.resolve(name)
    return _model(asked, context.models.served().get(asked.model, []))


def _model(asked: Asked, workers: list[WorkerInfo]) -> dict[str, Any]:
    """OpenAI's model object, then what the live workers say of it."""
    worker = workers[0] if workers else None
    return {
        "id": names.adapter_model(*asked),
        "object": "model",
        "created": int(min((one.started_at for one in workers), default=0)),
        "owned_by": "forebay",
        "parent": None if asked.adapter is None else asked.model,
        "status": worker.status.value if worker else "no_worker",
        "progress": worker.progress if worker else None,
        "workers": {status.value: sum(one.status is status for one in workers) for status in WorkerStatus},
        "aliases": list(worker.aliases) if worker and asked.adapter is None else [],
        "completion_types": list(worker.completion_types) if worker else [],
        "context_length": worker.context_length if worker else None,
        "quantization": worker.quantization if worker else None,
    }
