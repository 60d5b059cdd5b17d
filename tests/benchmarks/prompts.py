"""What clients send: prompts by their length, and prompts of which others have the beginning.

A word is a token of the default model, so lengths are in tokens, but for the template's 10 to 40.
"""

import asyncio
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import httpx

from benchmarks.tokens import Answer, Server, ask, figures

WORDS: Final = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend "
    "father power hour game line end member law car city community name president team minute idea body information"
)


QUESTION: Final = "Write a long story about a cat, a dog and a fox."


@dataclass(frozen=True, slots=True)
class Kind:
    """`clients` at once, each with a conversation of `requests`, one after the other. Lengths are in tokens."""

    clients: int
    first: int = 20
    """Of the first message."""
    system: int = 0
    """Of a system prompt that all conversations have."""
    requests: int = 1
    later: int = 100
    """Of the messages after the first; the answers come on top."""


KINDS: Final = {
    "2,000 tokens": Kind(2, 2000),
    # The default model's context has 8,192.
    "7,500 tokens": Kind(1, 7500),
    "20 tokens after a system prompt of 2,000": Kind(8, 20, system=2000),
    "conversations, 500 tokens and 100 more a request": Kind(4, 500, requests=4),
}


def words(count: int, seed: str) -> str:
    """Text of `count` tokens."""
    return " ".join(random.Random(seed).choices(WORDS.split(), k=count))


async def converse(
    http: httpx.AsyncClient, server: Server, kind: Kind, tokens: int, client: int, number: int
) -> list[Answer]:
    """One conversation; another `client` or `number` has another one."""
    messages: list[dict[str, Any]] = []
    if kind.system:
        messages.append({"role": "system", "content": words(kind.system, "system")})
    answers = []
    for request in range(kind.requests):
        length = kind.later if request else kind.first
        text = words(length - len(QUESTION.split()), f"{client}/{number}/{request}")
        content = f"{text}. {QUESTION}"
        messages.append({"role": "user", "content": content})
        answers.append(await ask(http, server, messages, tokens))
        messages.append({"role": "assistant", "content": answers[-1].text})
    return answers


async def turn(
    http: httpx.AsyncClient, servers: Sequence[Server], kind: Kind, tokens: int, number: int
) -> dict[str, float]:
    """All clients at once, each at one of `servers`. Of conversations, `first_ms` is the mean of later requests."""
    began = time.perf_counter()
    found = await asyncio.gather(
        *(
            converse(http, servers[client % len(servers)], kind, tokens, client, number)
            for client in range(kind.clients)
        )
    )
    took_s = time.perf_counter() - began
    answers = [answer for one in found for answer in one]
    later = [answer.first_s for one in found for answer in one[1:]]
    return figures(took_s, answers) | ({"first_ms": 1000 * statistics.fmean(later)} if later else {})
