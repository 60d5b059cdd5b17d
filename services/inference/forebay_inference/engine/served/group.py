"""Run a command that ends with its parent, and whose process group ends with it: `python -m … PID COMMAND...`.

vLLM starts processes of its own. When it is killed, they would go on, with the memory of the model.
"""

import os
import signal
import sys

from forebay_contracts.process import die_with_parent


def end_with(server: int) -> None:
    """Kill the group of this process, a child of `server`, when the server has ended."""
    signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGKILL))
    die_with_parent(server, signal.SIGTERM)
    while True:
        signal.pause()


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    server = os.getpid()
    if os.fork() == 0:
        end_with(server)
    os.execvp(sys.argv[2], sys.argv[2:])
