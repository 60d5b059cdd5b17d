"""Runs a command that cannot outlive its parent: `python -m forebay_cli.local.tied PARENT_PID COMMAND...`.

A program between the two, and not `preexec_fn`, which is not safe in a process that has threads.
"""

import os
import sys

from forebay_contracts.process import die_with_parent


def main() -> None:
    """Bind this process to its parent, then become the command."""
    die_with_parent(int(sys.argv[1]))
    os.execv(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
