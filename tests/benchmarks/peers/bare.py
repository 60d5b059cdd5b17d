"""`bare.py PORT`: the engine behind HTTP in one process, with no queue at all."""

import json
from collections.abc import AsyncIterator

from benchmarks.peers import http_app, simulated


def stream(body: bytes) -> AsyncIterator[str]:
    """Token by token."""
    return simulated.pieces(json.loads(body))


if __name__ == "__main__":
    http_app.serve(http_app.port(), simulated.answer, stream)
