"""A load generator that costs little: keep-alive connections, one prepared request, raw HTTP/1.1.

    python tests/benchmarks/driver.py PORT CLIENTS SECONDS [--stream] [--tokens 5] [--delay-ms 0] [--rate R] [--kb 400]

Closed loop: each of CLIENTS asks again as soon as it is answered. With `--requests`, SECONDS do not matter: so many are
sent, and what counts is the time until the last is answered. With `--rate`, open loop: requests are due at the times of
a Poisson process, on at most CLIENTS connections, and where none is free a latency counts from when its request was
due, so that a slow server cannot make the load wait for it. How late the driver itself was is `lag_ms`.

Prints JSON: answers a second, latencies and times to first token in ms, of each stream the mean time between two of its
tokens, tokens a second, answers by status, how many were not whole (`bad`). What was answered in the first `--warm-up`
seconds counts in `requests` and `not_200` only. The file of `--tally`, of 16 bytes, holds how many answers were whole
so far and how many were anything else, for somebody who stops and continues all of it. Run as a process of its own;
`ceiling.py` shows how far it goes.
"""

import argparse
import asyncio
import json
import mmap
import random
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop

MODEL = "SmolLM2-135M-Instruct"
FIRST = b'"t0'
"""How the text of the first token begins, in any answer."""
MESSAGE_BYTES = 2000
LINES = {
    "user": 'What does `run(body["size"], *args)` return here?\n\tassert "400" in str(size)\n',
    "assistant": "It returns the size in bytes, “400”, so the test passes.\n",
}
"""The lines of long messages, by role: with and without characters beyond ASCII."""


def to_json(value: Any) -> bytes:
    """As the SDKs write it."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def conversation(size: int) -> list[dict[str, str]]:
    """Messages of about MESSAGE_BYTES, by user and assistant in turn, `size` bytes in all."""
    messages = []
    for role in [*LINES] * (size // MESSAGE_BYTES // 2):
        line = LINES[role]
        messages.append({"role": role, "content": line * round(MESSAGE_BYTES / len(to_json(line)))})
    return messages


def request_bytes(
    tokens: int,
    *,
    stream: bool,
    delay_ms: float = 0,
    model: str = MODEL,
    response: str | None = None,
    size: int = 0,
    key: str | None = None,
) -> bytes:
    """The one request that is sent again and again; with `response`, a response that is `stored` or `live`.

    A chat of about `size` bytes is a conversation whose last message has the order.
    """
    order = f"[[tokens={tokens} delay_ms={delay_ms:g}]]" if delay_ms else f"[[tokens={tokens}]]"
    fields: dict[str, Any] = {"model": model, "messages": [*conversation(size), {"role": "user", "content": order}]}
    path = "/v1/chat/completions"
    if response is not None:
        path, fields = "/v1/responses", {"model": model, "input": order, "store": response == "stored"}
    body = to_json(fields | ({"stream": True} if stream else {}))
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    if key is not None:
        head += f"Authorization: Bearer {key}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


@dataclass
class Figures:
    """What was seen from `counted_from` to `until`, on the clock of `time.perf_counter`."""

    counted_from: float
    until: float
    last: bytes
    """How the text of a whole answer ends."""

    tally: memoryview
    """Whole answers, and others, so far."""

    latencies_s: list[float] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    stream_s: list[float] = field(default_factory=list)
    """From the first token to the end of the stream."""
    lag_s: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    last_at: float = 0
    """Of the last answer that counts."""
    answered: int = 0
    refused: int = 0
    bad: int = 0
    example: str = ""

    def take(self, status: int, due: float, first: float | None, answer: bytes) -> None:
        """Count one answer."""
        now = time.perf_counter()
        whole = status == 200 and self.last in answer
        self.tally[0 if whole else 1] += 1
        if status == 200:
            self.answered += 1
            if not whole:
                self.broken(answer)
        else:
            self.refused += 1
        if not self.counted_from <= now <= self.until:
            return
        self.statuses[status] += 1
        if status == 200:
            self.latencies_s.append(now - due)
            self.last_at = now
            if first is not None:
                self.first_s.append(first - due)
                self.stream_s.append(now - first)
        else:
            self.refused_s.append(now - due)

    def broken(self, answer: bytes) -> None:
        """An answer that is not whole."""
        self.bad += 1
        self.example = self.example or answer[-400:].decode(errors="replace")


class Client(asyncio.Protocol):
    """One connection: `send`, and `free` is called once the answer is whole."""

    def __init__(self, request: bytes, figures: Figures, free: Any) -> None:
        self._request = request
        self._figures = figures
        self._free = free
        self._parts: list[bytes] = []
        self._first: float | None = None
        self._busy = False
        self._length: int | None = None
        self._head_end = 0
        self._tail = b""
        self._status = 0
        self.closed = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self.transport: Any = transport

    def send(self, due: float) -> None:
        """Ask; `due` is when the latency begins."""
        self._due, self._busy = due, True
        self.transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Take an answer once it is whole."""
        parts = self._parts
        parts.append(data)
        if self._first is None and FIRST in data:
            self._first = time.perf_counter()
        if not self._status:
            data = b"".join(parts)
            end = data.find(b"\r\n\r\n")
            if end < 0:
                return
            head = data[:end].lower()
            self._status, self._head_end = int(head[9:12]), end + 4
            found = head.find(b"content-length:")
            self._length = None if found < 0 else int(head[found + 15 :].split(b"\r\n", 1)[0])
        if self._length is None:
            self._tail = (self._tail + data)[-7:]
            # The last chunk; should a token's text end like that within its chunk, the answer counts as bad.
            if self._tail == b"\r\n0\r\n\r\n":
                self._whole(b"".join(parts))
        elif sum(map(len, parts)) >= self._head_end + self._length:
            self._whole(b"".join(parts))

    def _whole(self, answer: bytes) -> None:
        self._figures.take(self._status, self._due, self._first, answer)
        self._parts, self._first, self._status, self._length, self._tail = [], None, 0, None, b""
        self._busy = False
        self._free(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        if self._busy and time.perf_counter() < self._figures.until:
            self._figures.broken(b"connection lost: " + b"".join(self._parts))
        if not self.closed.done():
            self.closed.set_result(None)


async def connect(port: int, count: int, request: bytes, figures: Figures, free: Any) -> list[Client]:
    """That many connections."""
    loop = asyncio.get_running_loop()
    clients: list[Client] = []
    for _ in range(count):
        _, client = await loop.create_connection(lambda: Client(request, figures, free), "127.0.0.1", port)
        clients.append(client)
    return clients


async def closed_loop(port: int, options: argparse.Namespace, request: bytes) -> Figures:
    """Each client asks again as soon as it is answered."""
    left = iter(range(options.requests or sys.maxsize))

    def again(client: Client) -> None:
        now = time.perf_counter()
        if now < figures.until and next(left, None) is not None:
            client.send(now)
        else:
            client.transport.close()

    figures = Figures(0, float("inf"), last_mark(options.tokens), tally(options.tally))
    clients = await connect(port, options.clients, request, figures, again)
    now = time.perf_counter()
    figures.counted_from, figures.until = now + options.warm_up, now + options.warm_up + options.seconds
    if options.requests:
        figures.until = float("inf")
    for client in clients:
        again(client)
    await settle(clients, figures, options)
    return figures


async def open_loop(port: int, options: argparse.Namespace, request: bytes) -> Figures:
    """Requests when they are due, whatever has become of the earlier ones."""
    free: deque[Client] = deque()
    late: deque[float] = deque()

    def idle(client: Client) -> None:
        if late:
            client.send(late.popleft())
        else:
            free.append(client)

    figures = Figures(0, float("inf"), last_mark(options.tokens), tally(options.tally))
    clients = await connect(port, options.clients, request, figures, idle)
    free.extend(clients)
    chance = random.Random(options.seed)
    due = time.perf_counter()
    figures.counted_from, figures.until = due + options.warm_up, due + options.warm_up + options.seconds
    while due < figures.until:
        if (wait_s := due - time.perf_counter()) > 0:
            await asyncio.sleep(wait_s)
        if free:
            # How late this loop wakes up is not the server's; it is told apart.
            now = time.perf_counter()
            figures.lag_s.append(now - due)
            free.popleft().send(now)
        else:
            late.append(due)
        due += chance.expovariate(options.rate)
    late.clear()
    await asyncio.sleep(max(0, figures.until - time.perf_counter()))
    # It may wake up a moment early: what is cut off from here on is cut off by this side.
    figures.until = min(figures.until, time.perf_counter())
    for client in clients:
        client.transport.close()
    await asyncio.gather(*(client.closed for client in clients))
    return figures


async def settle(clients: list[Client], figures: Figures, options: argparse.Namespace) -> None:
    """Wait for the answers that are under way at the end."""
    if not options.requests:
        await asyncio.sleep(max(0, figures.until - time.perf_counter()))
    _, pending = await asyncio.wait([client.closed for client in clients], timeout=options.patience)
    for client in clients:
        client.transport.abort()
    if pending:
        figures.bad += len(pending)
        figures.example = figures.example or "not answered"


def tally(path: Path | None) -> memoryview:
    """Two 64-bit numbers, in a file that others read where there is one."""
    if path is None:
        return memoryview(bytearray(16)).cast("Q")
    with path.open("r+b") as file:
        return memoryview(mmap.mmap(file.fileno(), 16)).cast("Q")


def last_mark(tokens: int) -> bytes:
    """How the text of a whole answer of so many tokens ends."""
    return b't%d"' % (tokens - 1)


def percentiles_ms(values_s: list[float]) -> dict[str, float]:
    """p50, p95, p99 and the most."""
    if not values_s:
        return {}
    ordered = sorted(values_s)
    return {
        name: round(1000 * ordered[min(int(len(ordered) * share), len(ordered) - 1)], 3)
        for name, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99), ("max", 1))
    }


def summary(figures: Figures, options: argparse.Namespace) -> dict[str, Any]:
    """What is printed."""
    counted, tokens = len(figures.latencies_s), options.tokens
    seconds = figures.last_at - figures.counted_from if options.requests else options.seconds
    gaps_s = [stream_s / (tokens - 1) for stream_s in figures.stream_s] if options.stream and tokens > 1 else []
    return {
        "requests": figures.answered,
        "requests_per_s": round(counted / seconds, 1),
        **{f"{name}_ms": value for name, value in percentiles_ms(figures.latencies_s).items()},
        "first_token_ms": percentiles_ms(figures.first_s),
        "between_ms": percentiles_ms(gaps_s),
        "tokens_per_s": round(counted * tokens / seconds, 1),
        "refused_ms": percentiles_ms(figures.refused_s),
        "lag_ms": percentiles_ms(figures.lag_s),
        "statuses": {str(status): count for status, count in sorted(figures.statuses.items())},
        "not_200": figures.refused,
        "bad": figures.bad,
        **({"example": figures.example} if figures.bad else {}),
    }


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("port", type=int)
    parser.add_argument("clients", type=int, help="connections")
    parser.add_argument("seconds", type=float)
    parser.add_argument("--warm-up", type=float, default=0, help="seconds of load that are not counted")
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--tokens", type=int, default=5, help="of each answer")
    parser.add_argument("--delay-ms", type=float, default=0, help="what the simulated engine waits before each token")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--response", choices=("stored", "live"), help="ask for responses, and not for chats")
    parser.add_argument("--kb", type=int, default=0, help="size of the body of a chat, in 1,000 bytes")
    parser.add_argument("--key", help="the API key that each request carries")
    parser.add_argument("--requests", type=int, help="end once so many were answered, closed loop")
    parser.add_argument("--rate", type=float, help="requests a second, open loop")
    parser.add_argument("--seed", type=int, default=1, help="of the arrivals")
    parser.add_argument("--patience", type=float, default=30, help="seconds for answers under way at the end")
    parser.add_argument("--tally", type=Path, help="file of 16 bytes, kept up to date")
    return parser.parse_args()


def main() -> int:
    """Load, print."""
    options = arguments()
    request = request_bytes(
        options.tokens,
        stream=options.stream,
        delay_ms=options.delay_ms,
        model=options.model,
        response=options.response,
        size=1000 * options.kb,
        key=options.key,
    )
    loop = open_loop if options.rate else closed_loop
    figures = uvloop.run(loop(options.port, options, request))
    print(json.dumps(summary(figures, options)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
