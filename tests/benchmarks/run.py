"""`make bench`: every part in turn, each within its time, then the report.

python tests/benchmarks/run.py [--quick] [--only PART ...]
"""

import argparse
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import HERE, log

PARTS = {
    "overhead": 540,
    "goals": 200,
    "overload": 150,
    "backlog": 150,
    "fifty_workers": 150,
    "bodies": 180,
    "tokens": 900,
    "loadgen": 240,
    "scale": 150,
    "cold": 60,
    "observability": 300,
}
"""Seconds planned for each; one that takes half as much again is ended."""


def ended(part: "subprocess.Popen[bytes]", timeout_s: float) -> int:
    """Its exit status; one that takes too long is interrupted, and so ends what it has started."""
    for patience_s, number in ((timeout_s, signal.SIGINT), (30, signal.SIGKILL)):
        try:
            return part.wait(patience_s)
        except subprocess.TimeoutExpired:
            part.send_signal(number)
    return part.wait()


def main() -> int:
    """Run the parts; 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short slices and few rounds")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    began, failed = time.monotonic(), []
    log(f"at most {sum(PARTS[part] for part in options.only) / 60:.0f} minutes are planned in full")
    for part in options.only:
        command = [sys.executable, str(HERE / f"{part}.py"), *(["--quick"] if options.quick else [])]
        if (status := ended(subprocess.Popen(command), 1.5 * PARTS[part])) != 0:
            log(f"{part} failed with {status}")
            failed.append(part)
    subprocess.run([sys.executable, str(HERE / "report.py")], check=True)
    log(f"{(time.monotonic() - began) / 60:.1f} minutes" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
