"""Requests of one conversation."""

import itertools

from forebay_contracts.wire.request import InferenceRequest
from support.twins import request

LONG = "word " * 1000


def chat(*messages: str, **fields: str) -> InferenceRequest:
    """A request whose messages are the user's and the model's in turns."""
    roles = itertools.cycle(("user", "assistant"))
    made = tuple({"role": role, "content": text} for role, text in zip(roles, messages, strict=False))
    return request(messages=made, **fields)
