"""The simulated engine of Forebay for a body of HTTP: the work that all peers have done by it."""

import json
from collections.abc import AsyncIterator
from typing import Any

from forebay_contracts.wire.request import CompletionType, InferenceRequest
from forebay_inference.engine.protocol import Tokens
from forebay_inference.engine.simulated import SimulatedEngine

_ENGINE = SimulatedEngine("peer")


async def pieces(body: dict[str, Any]) -> AsyncIterator[str]:
    """The text of each token."""
    request = InferenceRequest(
        id="benchmark",
        completion_type=CompletionType.CHAT,
        model=body["model"],
        created_at=0,
        deadline=0,
        reply_to="",
        messages=tuple(body["messages"]),
    )
    async for event in _ENGINE.generate(request, {}):
        if isinstance(event, Tokens):
            yield event.text


async def answer(body: bytes | str) -> str:
    """The whole text."""
    return "".join([piece async for piece in pieces(json.loads(body))])
