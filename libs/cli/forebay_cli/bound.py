"""Runs a command that cannot outlive its parent: `python -m forebay_cli.bound PARENT_PID COMMAND...`.

A program between the two, and not `preexec_fn`, which is not safe in a process that has threads.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Have the kernel kill this process with its parent (Linux, prctl(2)), then become the command."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    # A parent that died before that sends no signal any more.
    if os.getppid() != parent:
        sys.exit(1)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
