"""The api's application on the in-memory queue."""

from typing import Any

import httpx
from starlette.types import ASGIApp

from forebay_api.app import create_app
from forebay_api.clients.keys import ApiKeys
from forebay_api.context import Context
from forebay_api.openai.responses.stored import Responses
from forebay_api.watching.drain_rate import Rates
from forebay_api.watching.served_models import Models
from forebay_contracts.nats.consumers import KnownModel
from forebay_contracts.settings import ApiSettings
from support.twins import MODEL, Twins

NONE: Any = None
"""Stands for what these routes do not use."""


async def nobody_else() -> dict[str, KnownModel]:
    return {}


def app(system: Twins) -> ASGIApp:
    settings = ApiSettings(default_model=MODEL, request_timeout=30, stream_keep_alive=0.1, _env_file=None)
    return create_app(
        Context(
            settings=settings,
            connection=NONE,
            states=system.states,
            dispatcher=system.dispatcher,
            stored=NONE,
            mover=NONE,
            records=NONE,
            carried=NONE,
            files=NONE,
            batches=NONE,
            responses=Responses(NONE, NONE),
            idempotent=NONE,
            webhooks=NONE,
            failed=NONE,
            retries=NONE,
            workers=NONE,
            models=Models(settings, list, nobody_else),
            keys=ApiKeys(settings),
            limits=NONE,
            rates=Rates(),
            numbers=NONE,
            feed=NONE,
            answers=NONE,
            history=NONE,
            exposition=None,
        )
    )


async def post(system: Twins, path: str, fields: dict[str, Any], **headers: str) -> httpx.Response:
    transport = httpx.ASGITransport(app(system))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        return await client.post(path, json=fields, headers=headers)
