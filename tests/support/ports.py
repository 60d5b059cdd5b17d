"""Ports of the loopback interface that stay ours while nobody listens on them."""

import socket
import weakref


def bound(port: int = 0) -> socket.socket:
    """A socket that keeps a free port from being given to anybody who asks for one.

    Who listens on it does so with SO_REUSEADDR, as asyncio and Go's servers do.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", port))
    return holder


def port_of(owner: object) -> int:
    """A port that is kept for as long as `owner` is there."""
    holder = bound()
    weakref.finalize(owner, holder.close)
    port: int = holder.getsockname()[1]
    return port
