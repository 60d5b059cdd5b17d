"""Stored answers while everything is killed in turn.

    python tests/faults/stored_soak.py [--seconds 180] [--clients 200]

Each client asks for a background response, streamed, at some api. It leaves somewhere in the stream, or its api is
killed, and it takes the stream up by `starting_after` at whichever api it finds, until the end. Meanwhile apis, workers
and NATS are killed in turn. Afterwards, every response that a client was told of must be whole and exact at every api,
and its event stream there must be, byte for byte, what its client has put together. Prints JSON; exits 1 if not.
"""

import argparse
import asyncio
import itertools
import json
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.nats import NatsServer
from support.stack import MODEL, Stack, running

TOKENS = 60
WHOLE = " ".join(f"t{token}" for token in range(TOKENS))
ORDER = f"[[tokens={TOKENS} delay_ms=20]]"
LIMITS = {"max_concurrent_requests": 150, "worker_slots": 50, "max_queue_size": 1_000, "max_deliveries": 100}
CHECKED_AT_ONCE = 16
TAKE_UP_S = 60
"""How long a client tries to take a stream up."""


class Lost(Exception):
    """A stream could not be taken up."""


@dataclass
class Client:
    """One that asks again and again. `streams`: what it has put together, by response id."""

    stack: Stack
    dice: random.Random
    streams: dict[str, bytes] = field(default_factory=dict)
    taken_up: int = 0
    refused: Counter[int] = field(default_factory=Counter)
    pauses_s: list[float] = field(default_factory=list)
    """From a broken stream to its next event."""

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop` is set; what has begun is read to its end."""
        while not stop.is_set():
            got = await self._ask()
            if got is None:
                await asyncio.sleep(0.2)
                continue
            response_id, text = got
            began = time.monotonic()
            while not _is_whole(text):
                if time.monotonic() - began > TAKE_UP_S:
                    raise Lost(f"{response_id} after {text[-300:]!r}")
                text += await self._read("GET", f"/v1/responses/{response_id}?stream=true&starting_after={_last(text)}")
            self.streams[response_id] = text

    async def _ask(self) -> tuple[str, bytes] | None:
        """A new response's id and the first of its events, or None if no id was told."""
        body = {"model": MODEL, "input": ORDER, "background": True, "stream": True}
        text = await self._read("POST", "/v1/responses", json=body)
        if not text:
            return None
        return json.loads(text.split(b"data: ", 1)[1].split(b"\n", 1)[0])["response"]["id"], text

    async def _read(self, method: str, path: str, **more: Any) -> bytes:
        """The whole events of a stream, up to its end, a fault, or a moment at which the client leaves."""
        api = self.dice.choice(self.stack.apis[-2:])
        leaves_after = self.dice.choice((5, 20, 60, 10_000))
        text, asked = b"", time.monotonic()
        try:
            async with self.stack.http.stream(method, api.url + path, **more) as answer:
                if answer.status_code != 200:
                    self.refused[answer.status_code] += 1
                    await asyncio.sleep(0.1)
                    return b""
                async for piece in answer.aiter_bytes():
                    if not text and method == "GET":
                        self.taken_up += 1
                        self.pauses_s.append(time.monotonic() - asked)
                    text += piece
                    if text.count(b"\n\n") >= leaves_after:
                        break
        except httpx.HTTPError:
            await asyncio.sleep(0.1)
        return text[: text.rfind(b"\n\n") + 2] if b"\n\n" in text else b""


def _is_whole(text: bytes) -> bool:
    return b"event: response.completed\n" in text


def _last(text: bytes) -> int:
    return int(text.rsplit(b'"sequence_number":', 1)[1].split(b"}", 1)[0].split(b",", 1)[0])


async def kill_in_turn(stack: Stack, nats: NatsServer, stop: asyncio.Event, pause_s: float) -> Counter[str]:
    """An api, a worker, NATS; what was killed comes back. Returns how often."""
    killed: Counter[str] = Counter()
    for what in itertools.cycle(("api", "worker", "nats")):
        if stop.is_set():
            return killed
        match what:
            case "api":
                old = stack.apis[-2]
                await stack.api()
                await old.kill()
            case "worker":
                old_worker = stack.workers[-3]
                await old_worker.kill()
                await stack.worker()
            case _:
                await asyncio.to_thread(nats.kill)
                await asyncio.to_thread(nats.start)
        killed[what] += 1
        await asyncio.sleep(pause_s)
    return killed


async def check(stack: Stack, clients: list[Client]) -> dict[str, Any]:
    """What the stores say afterwards, at each api that is left."""
    wrong: list[str] = []
    few = asyncio.Semaphore(CHECKED_AT_ONCE)
    streams = {response_id: text for client in clients for response_id, text in client.streams.items()}

    async def one(api: str, response_id: str, text: bytes) -> None:
        async with few:
            whole = (await stack.http.get(f"{api}/v1/responses/{response_id}")).json()
            again = (await stack.http.get(f"{api}/v1/responses/{response_id}?stream=true")).content
        if whole["status"] != "completed" or whole["output"][0]["content"][0]["text"] != WHOLE:
            wrong.append(f"{response_id}: {json.dumps(whole)[:300]}")
        if again != text:
            wrong.append(f"{response_id}: its stream differs from what its client has")

    await asyncio.gather(*(one(api.url, *item) for api in stack.apis[-2:] for item in streams.items()))
    pauses = sorted(pause for client in clients for pause in client.pauses_s)
    return {
        "responses": len(streams),
        "taken_up": sum(client.taken_up for client in clients),
        "take_up_s": {"p50": round(pauses[len(pauses) // 2], 3), "max": round(pauses[-1], 3)} if pauses else {},
        "refused": dict(sum((client.refused for client in clients), Counter())),
        "wrong": wrong[:5],
        "wrong_count": len(wrong),
    }


async def soak(seconds: float, clients: int, pause_s: float = 3, seed: int = 1) -> dict[str, Any]:
    """The figures of one run."""
    with tempfile.TemporaryDirectory() as store:
        nats = NatsServer(Path(store))
        nats.start()
        try:
            async with running(nats, apis=2, workers=3, request_timeout=120, **LIMITS) as stack:
                stop = asyncio.Event()
                crowd = [Client(stack, random.Random(seed * 10_000 + number)) for number in range(clients)]
                running_clients = [asyncio.create_task(client.run(stop)) for client in crowd]
                killing = asyncio.create_task(kill_in_turn(stack, nats, stop, pause_s))
                await asyncio.sleep(seconds)
                stop.set()
                killed = await killing
                ends = await asyncio.gather(*running_clients, return_exceptions=True)
                lost = [str(end) for end in ends if isinstance(end, BaseException)]
                return {"killed": dict(killed), "lost": lost[:5], "lost_count": len(lost), **await check(stack, crowd)}
        finally:
            nats.stop()


def main() -> int:
    """Run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--pause", type=float, default=3, help="seconds between two kills")
    options = parser.parse_args()
    found = asyncio.run(soak(options.seconds, options.clients, options.pause))
    print(json.dumps(found, indent=1))
    return 1 if found["lost_count"] or found["wrong_count"] or not found["responses"] else 0


if __name__ == "__main__":
    sys.exit(main())
