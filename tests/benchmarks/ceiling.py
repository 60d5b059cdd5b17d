"""What the load generators can do at most: their target answers with prepared bytes and does nothing else.

    python tests/benchmarks/ceiling.py [--seconds 2]

A load generator whose ceiling is near a figure would have measured itself.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import Background, drive, free_port, wrk

_SERVER = """
import asyncio, json, sys, uvloop

def chunked(events):
    return b"".join(b"%x\\r\\n%s\\r\\n" % (len(event), event) for event in events) + b"0\\r\\n\\r\\n"

def events(tokens):
    for token in range(tokens):
        text = f"t{token}" if token == 0 else f" t{token}"
        choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
        yield b"data: " + json.dumps({"object": "chat.completion.chunk", "choices": [choice]}).encode() + b"\\n\\n"
    usage = {"prompt_tokens": 1, "completion_tokens": tokens, "total_tokens": tokens + 1}
    last = {"object": "chat.completion.chunk", "choices": [], "usage": usage}
    yield b"data: " + json.dumps(last).encode() + b"\\n\\n"
    yield b"data: [DONE]\\n\\n"

text = json.dumps({"choices": [{"message": {"content": " ".join(f"t{token}" for token in range(5))}}]}).encode()
UNARY = b"HTTP/1.1 200 OK\\r\\ncontent-type: application/json\\r\\ncontent-length: %d\\r\\n\\r\\n" % len(text) + text
HEAD = b"HTTP/1.1 200 OK\\r\\ncontent-type: text/event-stream\\r\\ntransfer-encoding: chunked\\r\\n\\r\\n"
STREAM = HEAD + chunked(events(int(sys.argv[2])))

class Canned(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport = transport
        self.seen = b""
    def data_received(self, data):
        # A client may send head and body apart; the body ends with its brace.
        self.seen += data
        if data.endswith(b"}"):
            self.transport.write(STREAM if b'"stream"' in self.seen else UNARY)
            self.seen = b""

async def main():
    server = await asyncio.get_running_loop().create_server(Canned, "127.0.0.1", int(sys.argv[1]))
    await server.serve_forever()

uvloop.run(main())
"""


@contextmanager
def canned(tokens: int) -> Iterator[int]:
    """A server that answers with prepared bytes; its port."""
    port = free_port()
    with Background("canned answers", [sys.executable, "-c", _SERVER, str(port), str(tokens)]) as server:
        server.wait_for_port(port)
        yield port


async def measure(seconds: float, clients: int = 64, tokens: int = 20) -> dict[str, Any]:
    """Requests a second of wrk and of the driver, and the driver's streams."""
    with canned(tokens) as port:
        return {
            "clients": clients,
            "wrk_requests_per_s": (await wrk(port, clients, max(1, round(seconds))))["requests_per_s"],
            "driver_requests_per_s": (await drive(port, clients, seconds))["requests_per_s"],
            "driver_streams_per_s": (await drive(port, clients, seconds, stream=True, tokens=tokens))["requests_per_s"],
            "driver_streamed_tokens": tokens,
        }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2)
    print(json.dumps(asyncio.run(measure(parser.parse_args().seconds)), indent=2))
