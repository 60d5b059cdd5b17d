"""The simulated engine: `t0 t1 t2 …`, so that the queue can be tested and measured apart from a model."""

import asyncio
import hashlib
import math
import os
import re
import struct
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

from forebay_contracts.wire.errors import InvalidRequest
from forebay_contracts.wire.request import CompletionType, InferenceRequest
from forebay_inference.engine.protocol import (
    Accepted,
    EngineEvent,
    EngineFault,
    EngineLoad,
    Finished,
    ModelInfo,
    ResumeTokens,
    Tokens,
    Vector,
)

_ORDERS = re.compile(r"\[\[([^\]]*)\]\]")
_DEFAULT_TOKENS = 5
_CONTEXT_LENGTH = 32_768
_DIMENSIONS = 64


@dataclass(frozen=True, slots=True)
class Orders:
    """What `[[tokens=20 delay_ms=50 fail crash]]` asks for: `tokens` how many, `delay_ms` before each,
    `fail` raises after them, `crash` ends the process there without a word."""

    tokens: int = _DEFAULT_TOKENS
    delay_ms: float = 0
    fail: bool = False
    crash: bool = False

    @classmethod
    def parse(cls, text: str) -> "Orders":
        """The orders in `text`; raises InvalidRequest for a word that is not one."""
        found = _ORDERS.search(text)
        if found is None:
            return cls()
        tokens, delay_ms, fail, crash = _DEFAULT_TOKENS, 0.0, False, False
        for word in found.group(1).split():
            name, _, value = word.partition("=")
            try:
                match name:
                    case "tokens":
                        tokens = int(value)
                    case "delay_ms":
                        delay_ms = float(value)
                    case "fail":
                        fail = True
                    case "crash":
                        crash = True
                    case _:
                        raise ValueError
            except ValueError:
                raise InvalidRequest(f"the simulated engine does not know the order {word!r}") from None
        return cls(tokens, delay_ms, fail, crash)


class SimulatedEngine:
    """Obeys orders in the last message; a lost or doubled token shows in its text. One engine, any concurrency.

    An embedding is a function of its input alone, a unit vector; `tokens` in its orders means nothing.
    """

    completion_types: tuple[CompletionType, ...] = tuple(CompletionType)

    def __init__(self, model_name: str) -> None:
        self._model = ModelInfo(model_name, _CONTEXT_LENGTH, "none", "none")
        self._running = 0
        self._steps = 0

    async def start(self, progress: Callable[[str], None]) -> ModelInfo:
        """Nothing to load."""
        progress("simulated engine: nothing to load")
        return self._model

    async def generate(self, request: InferenceRequest, resume: ResumeTokens) -> AsyncGenerator[EngineEvent, None]:
        """`t0 t1 …`, choice after choice; token k has id k. For embedding, a vector an input."""
        texts = _prompts(request)
        orders = [Orders.parse(text) for text in texts for _ in range(request.n)]
        yield Accepted(sum(len(text.split()) for text in texts))
        self._running += len(orders)
        try:
            async for event in self._obey_all(request, resume, texts, orders):
                yield event
        finally:
            self._running -= len(orders)

    async def _obey_all(
        self, request: InferenceRequest, resume: ResumeTokens, texts: list[str], orders: list[Orders]
    ) -> AsyncGenerator[EngineEvent, None]:
        limit = request.sampling.max_tokens
        for index, order in enumerate(orders):
            if request.completion_type is CompletionType.EMBEDDING:
                await asyncio.sleep(order.delay_ms / 1000)
                self._steps += 1
                _obey(order)
                if index not in resume:
                    yield Vector(index, _vector(texts[index], request.dimensions or _DIMENSIONS))
                yield Finished(index, "stop")
                continue
            count = order.tokens if limit is None else min(order.tokens, limit)
            for token in range(len(resume.get(index, ())), count):
                # Also without a delay: no engine keeps the event loop to itself.
                await asyncio.sleep(order.delay_ms / 1000)
                self._steps += 1
                yield Tokens(index, (token,), f"t{token}" if token == 0 else f" t{token}")
            _obey(order)
            yield Finished(index, "stop" if count == order.tokens else "length")

    def fault(self) -> str | None:
        """Never broken."""
        return None

    def load(self) -> EngineLoad:
        """Choices under way."""
        return EngineLoad(self._running, self._steps)

    async def close(self) -> None:
        """Nothing to free."""


def _prompts(request: InferenceRequest) -> list[str]:
    if request.messages:
        return [_text(request.messages[-1].get("content"))]
    return [prompt if isinstance(prompt, str) else " ".join(map(str, prompt)) for prompt in request.prompts]


def _obey(order: Orders) -> None:
    if order.crash:
        os._exit(70)
    if order.fail:
        raise EngineFault("the simulated engine was ordered to fail")


def _vector(text: str, dimensions: int) -> bytes:
    numbers = hashlib.shake_128(text.encode()).digest(dimensions)
    values = [number - 127.5 for number in numbers]
    norm = math.hypot(*values)
    return struct.pack(f"<{dimensions}f", *(value / norm for value in values))


def _text(content: object) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content if isinstance(part, dict))
    return ""
