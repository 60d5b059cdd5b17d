"""Run a command that the kernel kills when its parent dies: `python -m forebay_contracts.parent_death PID COMMAND...`.

It is a program of its own because `preexec_fn` is not safe in a process with threads.
"""

import os
import sys

from forebay_contracts.process import die_with_parent

if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])
