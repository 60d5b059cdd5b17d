"""Bodies that cost an api as much as they can, sent by a process of their own, and what other clients feel of them."""

import asyncio
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Final

import httpx

from support.answers import chat_body, user
from support.stack import MODEL, Stack

SIZE: Final = 890_000
"""Bytes of a body, just below the default of MAX_REQUEST_BYTES."""

STREAMS: Final = 16
TOKENS: Final = 50
TOKEN_MS: Final = 20

Kind = Callable[[], tuple[str, dict[str, Any]]]
"""Makes the path below /v1 and the members of a body of SIZE."""


def _filled(item: Any) -> list[Any]:
    return [item] * (SIZE // len(json.dumps(item) + ", "))


def _members(value: Any) -> dict[str, Any]:
    return {f"k{number}": value for number in range(SIZE // (len(json.dumps(value)) + 12))}


def _completion(prompt: Any) -> Kind:
    return lambda: ("completions", {"prompt": _filled(prompt), "max_tokens": 1})


def _embeddings(item: Any) -> Kind:
    return lambda: ("embeddings", {"input": _filled(item)})


def _chat(**fields: Callable[[], Any]) -> Kind:
    made = {"messages": lambda: user("hi"), "max_tokens": lambda: 1} | fields
    return lambda: ("chat/completions", {name: make() for name, make in made.items()})


_TOOL: Final = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}

REFUSED: Final[dict[str, Kind]] = {
    **{f"prompt {json.dumps(item)}": _completion(item) for item in ({}, [], [0.5, 0.5], 0.5, None)},
    **{f"input {json.dumps(item)}": _embeddings(item) for item in ({}, [], 0.5, "a")},
    "token ids and a text": lambda: ("completions", {"prompt": [*_filled(7), "a"]}),
    "messages 1": _chat(messages=lambda: _filled(1)),
    "messages {}": _chat(messages=lambda: _filled({})),
    "content parts {}": _chat(messages=lambda: user(_filled({}))),  # type: ignore[arg-type]
    "tools {}": _chat(tools=lambda: _filled({})),
    "tools and a bad choice": _chat(tools=lambda: _filled(_TOOL), tool_choice=lambda: 1),
    "logit_bias keys": _chat(logit_bias=lambda: _members(1)),
    "metadata": _chat(metadata=lambda: _members(1)),
    "unknown parameters": lambda: ("chat/completions", {"messages": user("hi"), **_members(1)}),
}
SERVED: Final[dict[str, Kind]] = {
    "token ids": _completion(7),
    "a long text": _chat(messages=lambda: user("word " * (SIZE // 5))),
    "messages": _chat(messages=lambda: _filled(user("hi")[0])),
    "content parts": _chat(messages=lambda: user(_filled({"type": "text", "text": "a"}))),  # type: ignore[arg-type]
    "tools": _chat(tools=lambda: _filled(_TOOL)),
    "template options": _chat(chat_template_kwargs=lambda: _members([{}])),
    "texts to embed": lambda: ("embeddings", {"input": ["word " * (SIZE // 2048 // 5)] * 2048, "dimensions": 384}),
}
KINDS: Final = REFUSED | SERVED


@dataclass
class Felt:
    """What others felt: the longest wait for /health/live and for a token, and the answers that were wrong."""

    health_s: float = 0.0
    token_s: float = 0.0
    answers: int = 0
    wrong: list[str] = field(default_factory=list)
    statuses: dict[str, dict[str, int]] = field(default_factory=dict)
    """How often each status came, by the kind of body."""


async def attacked(stack: Stack, kinds: Collection[str], at_once: int) -> Felt:
    """Send `at_once` bodies of each of `kinds` in turn, while STREAMS clients read tokens from the same api."""
    felt, url, over = Felt(), stack.apis[0].url, asyncio.Event()

    async def read() -> None:
        while not over.is_set():
            await _read(stack, url, felt)

    async def probe() -> None:
        while not over.is_set():
            began = time.monotonic()
            answer = await stack.http.get(f"{url}/health/live")
            felt.health_s = max(felt.health_s, time.monotonic() - began)
            if answer.status_code != 200:
                felt.wrong.append(f"/health/live: {answer.status_code}")
            await asyncio.sleep(0.005)

    others = [asyncio.create_task(work()) for work in (probe, *[read] * STREAMS)]
    command = (sys.executable, "-m", __name__, url, str(at_once), *kinds)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        attack = await asyncio.create_subprocess_exec(*command, env=env, stdout=asyncio.subprocess.PIPE)
        felt.statuses = json.loads((await attack.communicate())[0])
    finally:
        over.set()
        await asyncio.gather(*others)
    return felt


async def _read(stack: Stack, url: str, felt: Felt) -> None:
    body = chat_body(f"[[tokens={TOKENS} delay_ms={TOKEN_MS}]]", stream=True)
    text, last = "", None
    async with stack.http.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                now = time.monotonic()
                felt.token_s = max(felt.token_s, now - (last or now))
                text, last = text + json.loads(line[6:])["choices"][0]["delta"].get("content", ""), now
    felt.answers += 1
    if text != " ".join(f"t{token}" for token in range(TOKENS)):
        felt.wrong.append(f"{answer.status_code}: {text}")


async def _send(url: str, at_once: int, kinds: list[str]) -> dict[str, Counter[int]]:
    found: dict[str, Counter[int]] = {}
    async with httpx.AsyncClient(timeout=120, headers={"content-type": "application/json"}) as client:
        for kind in kinds:
            path, fields = KINDS[kind]()
            body = json.dumps({"model": MODEL, **fields}).encode()
            sent = (client.post(f"{url}/v1/{path}", content=body) for _ in range(at_once))
            found[kind] = Counter(answer.status_code for answer in await asyncio.gather(*sent))
    return found


if __name__ == "__main__":
    print(json.dumps(asyncio.run(_send(sys.argv[1], int(sys.argv[2]), sys.argv[3:]))))
