"""The process that services are forked from: it has imported them, which else takes each stack of a test 0.9 s of CPU.

A child is what `python -m MODULE` is: it has the environment, the folder and the
stderr of its order, executes the module's `__main__` and ends as an interpreter does. If the environment has
CLOCK_AHEAD_S, the child's wall clock is so many seconds ahead.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import time
import warnings
from dataclasses import asdict, dataclass

from forebay_contracts.nats import clock

IMPORTED = ("forebay_api.server", "forebay_inference.__main__", "forebay_inference.worker")
MAX_ORDER_BYTES = 2**18


@dataclass(frozen=True)
class Order:
    """What to run, and where."""

    module: str
    folder: str
    env: dict[str, str]


def send(orders: socket.socket, order: Order, errors: int, status: int) -> None:
    """Have a service started. Its stderr is `errors`; `status` gets its pid at once and its exit status at its end."""
    socket.send_fds(orders, [json.dumps(asdict(order)).encode()], [errors, status])


def serve(orders: socket.socket) -> Order | None:
    """Fork for each order, until nobody is there to give one; in a child, return with its order.

    Children that are left then are killed.
    """
    children: dict[int, int] = {}
    woken, wakeup = socket.socketpair()
    with orders, woken, wakeup, selectors.DefaultSelector() as selector:
        wakeup.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wakeup.fileno())
        selector.register(orders, selectors.EVENT_READ)
        selector.register(woken, selectors.EVENT_READ)
        while True:
            ready = [key.fileobj for key, _ in selector.select()]
            if woken in ready:
                woken.recv(4096)
                _tell_who_ended(children)
            if orders in ready:
                received, fds, _, _ = socket.recv_fds(orders, MAX_ORDER_BYTES, 2)
                if not received:
                    break
                errors, status = fds
                if (pid := os.fork()) == 0:
                    os.dup2(errors, sys.stderr.fileno())
                    for fd in (errors, status, *children.values()):
                        os.close(fd)
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    return Order(**json.loads(received))
                os.close(errors)
                os.write(status, b"%d\n" % pid)
                children[pid] = status
    for pid in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return None


def _tell_who_ended(children: dict[int, int]) -> None:
    for pid in list(children):
        ended, how = os.waitpid(pid, os.WNOHANG)
        if ended:
            status = children.pop(pid)
            with contextlib.suppress(BrokenPipeError):  # nobody waits for it
                os.write(status, b"%d\n" % os.waitstatus_to_exitcode(how))
            os.close(status)


def _set_clock(ahead_s: float) -> None:
    """Let this process see a wall clock that is `ahead_s` ahead (negative: behind)."""
    right = time.time
    time.time = lambda: right() + ahead_s
    importlib.reload(clock)  # it was imported while the clock was right


def main() -> None:
    """Serve the orders on the socket whose number is the argument."""
    for module in IMPORTED:
        importlib.import_module(module)
    gc.freeze()  # a collection in a child would copy the pages of all of it
    if (mine := serve(socket.socket(fileno=int(sys.argv[1])))) is None:
        return
    os.chdir(mine.folder)
    os.environ.clear()
    os.environ.update(mine.env)
    if (ahead_s := float(os.environ.get("CLOCK_AHEAD_S", 0))) != 0:
        _set_clock(ahead_s)
    warnings.simplefilter("default")  # as PYTHONWARNINGS says, which is read when an interpreter starts
    sys.modules.pop(f"{mine.module}.__main__", None)
    runpy.run_module(mine.module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
