"""Embeddings and scores of a model in the test's own process."""

from typing import Any

import numpy as np

from forebay_contracts.wire.request import CompletionType, InferenceRequest
from forebay_inference.engine.events import Accepted, Finished, Used, Vector
from forebay_inference.engine.text.model import TextModel

NAME = "all-MiniLM-L6-v2"
TEXTS = [
    "The cat sits on the mat.",
    "A cat is sitting on a rug.",
    "Interest rates rose by half a percent.",
    "  leading spaces, and ünïcödé — 日本語 🙂",
    "word " * 60,
]


def embedding(*inputs: str | tuple[int, ...], **fields: Any) -> InferenceRequest:
    given = {"id": "r", "model": NAME, "created_at": 0, "deadline": 0, "reply_to": "", "prompts": inputs, **fields}
    return InferenceRequest(completion_type=CompletionType.EMBEDDING, **given)


async def vectors(engine: TextModel, *inputs: str | tuple[int, ...]) -> tuple[int, dict[int, Any]]:
    """Prompt tokens, and the vector of each input; checks the order of the events on the way."""
    tokens, found, finished = 0, {}, []
    async for event in engine.generate(embedding(*inputs), {}):
        match event:
            case Accepted():
                assert not found
                tokens = event.prompt_tokens
            case Vector():
                found[event.index] = np.frombuffer(event.values, dtype="<f4")
            case Finished():
                assert event.finish_reason == "stop"
                finished.append(event.index)
    assert sorted(finished) == sorted(found) == list(range(len(inputs)))
    return tokens, found


QUERY = "How do cats sleep?"


async def scores(model: TextModel, *documents: str) -> tuple[int, Any]:
    """The tokens that it took, and the score of each document for QUERY."""
    given = {"id": "r", "model": NAME, "created_at": 0, "deadline": 0, "reply_to": "", "prompts": (QUERY, *documents)}
    tokens, found = 0, np.full(len(documents), np.nan)
    async for event in model.generate(InferenceRequest(completion_type=CompletionType.RERANK, **given), {}):
        match event:
            case Vector():
                (found[event.index],) = np.frombuffer(event.values, dtype="<f4")
            case Used():
                tokens = event.usage.prompt_tokens
    return tokens, found
