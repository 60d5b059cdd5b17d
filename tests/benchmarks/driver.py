"""A load generator that costs little: keep-alive connections, one prepared request, raw HTTP/1.1.

    python tests/benchmarks/driver.py PORT CLIENTS SECONDS

Prints JSON: requests a second, latencies in ms, how many answers were not 200. Run as a process of its own.
"""

import asyncio
import json
import sys
import time

import uvloop

BODY = json.dumps(
    {"model": "SmolLM2-135M-Instruct", "messages": [{"role": "user", "content": "[[tokens=5]]"}]}
).encode()
REQUEST = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n" % len(BODY)
) + BODY


class Client(asyncio.Protocol):
    """Sends the request again as soon as it is answered, until `until`."""

    def __init__(self, until: float, latencies_s: list[float], bad: list[bytes]) -> None:
        self._until = until
        self._latencies_s = latencies_s
        self._bad = bad
        self._buffer = b""
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = transport
        self._send()

    def data_received(self, data: bytes) -> None:
        """Take an answer once it is whole."""
        self._buffer += data
        head, found, body = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return
        length = int(head.lower().split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
        if len(body) < length:
            return
        now = time.perf_counter()
        self._latencies_s.append(now - self._sent_at)
        if not head.startswith(b"HTTP/1.1 200"):
            self._bad.append(head)
        self._buffer = b""
        if now < self._until:
            self._send()
        else:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        if not self.done.done():
            self.done.set_result(None)

    def _send(self) -> None:
        self._sent_at = time.perf_counter()
        self._transport.write(REQUEST)  # type: ignore[attr-defined]


async def drive(port: int, clients: int, seconds: float) -> dict[str, float]:
    """Load for `seconds`; the figures."""
    latencies_s: list[float] = []
    bad: list[bytes] = []
    loop = asyncio.get_running_loop()
    start = time.perf_counter()
    protocols = [
        (await loop.create_connection(lambda: Client(start + seconds, latencies_s, bad), "127.0.0.1", port))[1]
        for _ in range(clients)
    ]
    await asyncio.gather(*(protocol.done for protocol in protocols))
    took_s = time.perf_counter() - start
    latencies_s.sort()

    def percentile_ms(share: float) -> float:
        return round(1000 * latencies_s[min(int(len(latencies_s) * share), len(latencies_s) - 1)], 3)

    return {
        "requests": len(latencies_s),
        "requests_per_s": round(len(latencies_s) / took_s, 1),
        "p50_ms": percentile_ms(0.5),
        "p95_ms": percentile_ms(0.95),
        "p99_ms": percentile_ms(0.99),
        "not_200": len(bad),
    }


if __name__ == "__main__":
    print(json.dumps(uvloop.run(drive(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))))
