"""A model for tests, requests for it, and what came back, folded."""

import contextlib
import uuid
from dataclasses import dataclass, field
from typing import Any

from forebay_contracts.wire.frames import TokenLogprob
from forebay_contracts.wire.request import CompletionType, InferenceRequest, Sampling
from forebay_inference.engine.events import Accepted, Finished, ResumeTokens, Tokens
from forebay_inference.engine.simulated import SimulatedEngine
from forebay_inference.engine.text.model import TextModel


def simulated_model() -> TextModel:
    """The simulated engine with the text layer, started: that waits for nothing."""
    model = TextModel(SimulatedEngine())
    with contextlib.suppress(StopIteration):
        model.start(lambda line: None).send(None)
    return model


def chat(text: str = "What is the capital of France?", **fields: Any) -> InferenceRequest:
    """A chat request; the fields of `Sampling` may be given beside those of the request. Greedy by default."""
    fields.setdefault("messages", ({"role": "user", "content": text},))
    return _request(CompletionType.CHAT, fields)


def completion(*prompts: str | tuple[int, ...], **fields: Any) -> InferenceRequest:
    """A completion request of one or more prompts, otherwise like `chat`."""
    return _request(CompletionType.COMPLETION, {"prompts": prompts, **fields})


def _request(kind: CompletionType, fields: dict[str, Any]) -> InferenceRequest:
    names = set(Sampling.model_fields)
    sampling = {"temperature": 0.0, "max_tokens": 32, **{k: v for k, v in fields.items() if k in names}}
    rest = {k: v for k, v in fields.items() if k not in names}
    return InferenceRequest(
        **{
            "id": str(uuid.uuid4()),
            "completion_type": kind,
            "model": "m",
            "created_at": 0.0,
            "deadline": 0.0,
            "reply_to": "",
            "sampling": Sampling(**sampling),
            **rest,
        }
    )


@dataclass
class Answer:
    """One choice as its client would have it."""

    text: str = ""
    reasoning: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    pieces: list[str] = field(default_factory=list)


async def answers(model: TextModel, request: InferenceRequest, resume: ResumeTokens | None = None) -> dict[int, Answer]:
    """Every choice, by index. Checks the order of the events on the way."""
    found: dict[int, Answer] = {}
    accepted = 0
    async for event in model.generate(request, resume or {}):
        match event:
            case Accepted():
                accepted += 1
                assert not found
            case Tokens():
                answer = found.setdefault(event.index, Answer())
                assert answer.finish_reason is None
                answer.text += event.text
                answer.reasoning += event.reasoning
                answer.pieces.append(event.text)
                answer.tokens.extend(event.token_ids)
                answer.logprobs.extend(event.logprobs)
                answer.tool_calls.extend(event.tool_calls)
            case Finished():
                answer = found.setdefault(event.index, Answer())
                assert answer.finish_reason is None
                answer.finish_reason, answer.cached_tokens = event.finish_reason, event.cached_tokens
                answer.reasoning_tokens = event.reasoning_tokens
    assert accepted == 1
    return found


async def answer(model: TextModel, request: InferenceRequest, resume: ResumeTokens | None = None) -> Answer:
    """The only choice."""
    (found,) = (await answers(model, request, resume)).values()
    return found
