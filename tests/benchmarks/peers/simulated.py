"""The simulated engine of Forebay for a body of HTTP: the work that all peers have done by it."""

import json
from collections.abc import AsyncIterator
from typing import Any

from forebay_contracts.wire.request import CompletionType, InferenceRequest
from forebay_inference.engine.events import Tokens
from forebay_inference.engine.simulated import SimulatedEngine
from forebay_inference.engine.text.model import TextModel

_started: list[TextModel] = []


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
    if not _started:
        model = TextModel(SimulatedEngine())
        await model.start(lambda line: None)
        _started.append(model)
    async for event in _started[0].generate(request, {}):
        if isinstance(event, Tokens):
            yield event.text


async def answer(body: bytes | str) -> str:
    """The whole text."""
    return "".join([piece async for piece in pieces(json.loads(body))])
