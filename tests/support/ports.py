"""Ports of the loopback interface that stay ours while nobody listens on them."""

import socket
import sys
import weakref


def port_of(owner: object) -> int:
    """A free port that nobody else is given for as long as `owner` is there; elsewhere than on Linux, for now alone.

    Who listens on it does so with SO_REUSEADDR, as asyncio and Go's servers do.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    port: int = holder.getsockname()[1]
    if sys.platform == "linux":
        weakref.finalize(owner, holder.close)
    else:
        holder.close()  # nobody could listen beside it
    return port
