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
import psutil

from support.answers import chat_body, user
from support.stack import MODEL, Stack

LARGE: Final = 890_000
"""Bytes of a body just below the default of MAX_REQUEST_BYTES."""

STREAMS: Final = 16
TOKENS: Final = 50
TOKEN_MS: Final = 20

Fill = Callable[[int], Any]
Kind = Callable[[int], tuple[str, dict[str, Any]]]
"""Makes the path below /v1 and the members of a body of so many bytes."""


def _filled(item: Any) -> Fill:
    return lambda size: [item] * (size // len(json.dumps(item) + ", "))


def _members(value: Any) -> Fill:
    return lambda size: {f"k{number}": value for number in range(size // (len(json.dumps(value)) + 12))}


def _said(content: Fill) -> Fill:
    return lambda size: [{"role": "user", "content": content(size)}]


def _completion(prompt: Fill) -> Kind:
    return lambda size: ("completions", {"prompt": prompt(size), "max_tokens": 1})


def _embeddings(texts: Fill, **more: Any) -> Kind:
    return lambda size: ("embeddings", {"input": texts(size), **more})


def _chat(**fields: Fill) -> Kind:
    usual = {"messages": user("hi"), "max_tokens": 1}
    return lambda size: ("chat/completions", usual | {name: fill(size) for name, fill in fields.items()})


_TOOL: Final = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}

REFUSED: Final[dict[str, Kind]] = {
    **{f"prompt {json.dumps(item)}": _completion(_filled(item)) for item in ({}, [], [0.5, 0.5], 0.5, None)},
    **{f"input {json.dumps(item)}": _embeddings(_filled(item)) for item in ({}, [], 0.5, "a")},
    "token ids and a text": _completion(lambda size: [*_filled(7)(size), "a"]),
    "messages 1": _chat(messages=_filled(1)),
    "messages {}": _chat(messages=_filled({})),
    "content parts {}": _chat(messages=_said(_filled({}))),
    "tools {}": _chat(tools=_filled({})),
    "tools and a bad choice": _chat(tools=_filled(_TOOL), tool_choice=lambda _: 1),
    "logit_bias keys": _chat(logit_bias=_members(1)),
    "metadata": _chat(metadata=_members(1)),
    "unknown parameters": lambda size: ("chat/completions", {"messages": user("hi"), **_members(1)(size)}),
}
SERVED: Final[dict[str, Kind]] = {
    "token ids": _completion(_filled(7)),
    "a long text": _chat(messages=_said(lambda size: "word " * (size // 5))),
    "messages": _chat(messages=_filled(user("hi")[0])),
    "content parts": _chat(messages=_said(_filled({"type": "text", "text": "a"}))),
    "tools": _chat(tools=_filled(_TOOL)),
    "template options": _chat(chat_template_kwargs=_members([{}])),
    "texts to embed": _embeddings(lambda size: ["word " * (size // 2048 // 5 or 1)] * 2048, dimensions=384),
}
KINDS: Final = REFUSED | SERVED


@dataclass
class Felt:
    """What others felt: the longest wait for /health/live and for a token, and the answers that were wrong.

    `cpu_s` is the most that the api, or the worker, computed during one wait, whatever else the machine does.
    """

    health_s: float = 0.0
    token_s: float = 0.0
    cpu_s: float = 0.0
    answers: int = 0
    wrong: list[str] = field(default_factory=list)
    statuses: dict[str, dict[str, int]] = field(default_factory=dict)
    """How often each status came, by the kind of body."""


async def attacked(stack: Stack, kinds: Collection[str], at_once: int, size: int = LARGE) -> Felt:
    """Send `at_once` bodies of `size` bytes of each of `kinds` in turn, while STREAMS clients read tokens."""
    felt, url, over = Felt(), stack.apis[0].url, asyncio.Event()
    services = [psutil.Process(service.pid) for service in (stack.apis[0], *stack.workers)]

    def computed_s() -> list[float]:
        return [sum(service.cpu_times()[:2]) for service in services]

    async def read() -> None:
        while not over.is_set():
            await _read(stack, url, felt, computed_s)

    async def probe() -> None:
        while not over.is_set():
            began, computed = time.monotonic(), computed_s()
            answer = await stack.http.get(f"{url}/health/live")
            felt.health_s = max(felt.health_s, time.monotonic() - began)
            felt.cpu_s = max(felt.cpu_s, _most(computed, computed_s()))
            if answer.status_code != 200:
                felt.wrong.append(f"/health/live: {answer.status_code}")
            await asyncio.sleep(0.005)

    others = [asyncio.create_task(work()) for work in (probe, *[read] * STREAMS)]
    command = (sys.executable, "-m", __name__, url, str(at_once), str(size), *kinds)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        attack = await asyncio.create_subprocess_exec(*command, env=env, stdout=asyncio.subprocess.PIPE)
        felt.statuses = json.loads((await attack.communicate())[0])
    finally:
        over.set()
        await asyncio.gather(*others)
    return felt


async def _read(stack: Stack, url: str, felt: Felt, computed_s: Callable[[], list[float]]) -> None:
    body = chat_body(f"[[tokens={TOKENS} delay_ms={TOKEN_MS}]]", stream=True)
    text, last = "", None
    async with stack.http.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                now = time.monotonic(), computed_s()
                felt.token_s = max(felt.token_s, now[0] - (last or now)[0])
                felt.cpu_s = max(felt.cpu_s, _most((last or now)[1], now[1]))
                text, last = text + json.loads(line[6:])["choices"][0]["delta"].get("content", ""), now
    felt.answers += 1
    if text != " ".join(f"t{token}" for token in range(TOKENS)):
        felt.wrong.append(f"{answer.status_code}: {text}")


def _most(before: list[float], after: list[float]) -> float:
    return max(b - a for a, b in zip(before, after, strict=True))


async def _send(url: str, at_once: int, size: int, kinds: list[str]) -> dict[str, Counter[int]]:
    found: dict[str, Counter[int]] = {}
    options = {"limits": httpx.Limits(max_connections=None), "headers": {"content-type": "application/json"}}
    async with httpx.AsyncClient(timeout=120, **options) as client:  # type: ignore[arg-type]
        for kind in kinds:
            path, fields = KINDS[kind](size)
            body = json.dumps({"model": MODEL, **fields}).encode()
            sent = (client.post(f"{url}/v1/{path}", content=body) for _ in range(at_once))
            found[kind] = Counter(answer.status_code for answer in await asyncio.gather(*sent))
    return found


if __name__ == "__main__":
    print(json.dumps(asyncio.run(_send(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]))))
