"""An old commit against the working tree: requests/s by clients, streamed and not, and memory of a waiting request.

    python tests/benchmarks/compare.py --old REV [--quick] [--blocks 3] [--pairs 20]
                                       [--clients 1 16 64] [--modes whole streamed memory]
                                       [--delay-ms 10] [--setting LOG_FORMAT=json ...]
                                       [--new-setting API_KEYS=KEY ...]

REV is checked out into a temporary git worktree. Of each commit, a nats-server, an api and a worker with the simulated
engine run in turns of 0.2 s (turns.py): the other system is stopped meanwhile. Both use the interpreter and the
packages of this environment; each service has the sources of its own commit first on PYTHONPATH. `--new REV` takes
another commit in place of the working tree. One `--setting` is one setting of both systems, and one `--new-setting`
one of the new system alone: `--old HEAD --new-setting API_KEYS=KEY` shows what keys cost, most of it the count of their
usage.

Modes: "whole" is answers of 5 tokens, "streamed" is streams of 20 tokens, "large" is as "whole"
with bodies of 400 KB (not in the default), "memory" is what one waiting request adds to
the api's own memory (as goals.py measures it). `--delay-ms` is the time of a token; 0 shows the cost of the path alone.
A block is one pair of systems, and the next block starts new ones: two equal systems differ by a few percent for as
long as they live. With `--old HEAD` on a clean tree, the spread of the ratios is the error of the measurement.

Prints one line for each measurement: median, least and most of new ÷ old over all blocks, and the medians of both.
"CPU ms" is the CPU time of a service for one request; for it and for memory, less is better. In full it takes
about 5 minutes, with --quick one.
"""

import argparse
import asyncio
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import ROOT, log, ratios
from benchmarks.goals import WAITING, waiting_memory
from benchmarks.turns import orders, pairs, started

MODES = {
    "whole": ("--tokens", "5"),
    "streamed": ("--tokens", "20", "--stream"),
    "large": ("--tokens", "5", "--kb", "400"),
}
"""By mode, how driver.py loads."""
MEMORY = "memory"
WAITING_REQUESTS, WAITING_REQUESTS_QUICK = 2000, 500
PACKAGES = ("libs/contracts", "libs/cli", "services/api", "services/inference")

Figures = dict[str, dict[str, list[float]]]
"""By measurement, then by "old" or "new", the figure of each block."""


@contextlib.contextmanager
def checkout(revision: str) -> Iterator[Path]:
    """A commit in a folder of its own."""

    def git(*arguments: str) -> None:
        subprocess.run(("git", *arguments), cwd=ROOT, check=True, capture_output=True)

    with tempfile.TemporaryDirectory(prefix="forebay-bench-") as folder:
        tree = Path(folder) / "tree"
        git("worktree", "add", "--detach", str(tree), revision)
        try:
            yield tree
        finally:
            git("worktree", "remove", "--force", str(tree))


def chosen(name: str, options: argparse.Namespace) -> dict[str, str]:
    """The settings that the command line gives the system of this name."""
    given = options.setting + (options.new_setting if name == "new" else [])
    return dict(setting.split("=", 1) for setting in given)


def of(name: str, tree: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The settings of a system that runs the code of `tree`."""
    path = os.pathsep.join(str(tree / package) for package in PACKAGES)
    command = (sys.executable, "-c", "import forebay_api; print(forebay_api.__path__[0])")
    found = subprocess.check_output(command, env=os.environ | {"PYTHONPATH": path}, text=True).strip()
    if not Path(found).is_relative_to(tree):
        raise RuntimeError(f"a service would run the code of {found} and not of {tree}")
    settings = chosen(name, options)
    return {setting.lower(): value for setting, value in settings.items()} | {"pythonpath": path}


async def requests(names: list[str], trees: dict[str, Path], options: argparse.Namespace, found: Figures) -> None:
    """One block of all loads, each with the key in API_KEYS of its system, if one is set."""
    async with contextlib.AsyncExitStack() as running:
        systems = {name: await running.enter_async_context(started(**of(name, trees[name], options))) for name in names}
        for mode in (mode for mode in options.modes if mode != MEMORY):
            for clients in options.clients:
                async with contextlib.AsyncExitStack() as loads:
                    for name, system in systems.items():
                        key = chosen(name, options).get("API_KEYS")
                        flags = (*MODES[mode], "--delay-ms", str(options.delay_ms), *(("--key", key) if key else ()))
                        await loads.enter_async_context(system.load(clients, *flags))
                    await pairs([*systems.values()], options.pairs)
                for name, system in systems.items():
                    found[f"requests/s, {mode}, {clients} clients"][name].append(system.requests_per_s())
                    for service, ms in system.cpu_ms().items():
                        found[f"{service} CPU ms, {mode}, {clients} clients"][name].append(ms)


async def memory(names: list[str], trees: dict[str, Path], options: argparse.Namespace, found: Figures) -> None:
    """One block of what a waiting request takes, one system after the other."""
    for name in names:
        async with started(**of(name, trees[name], options) | WAITING) as system:
            most = WAITING_REQUESTS_QUICK if options.quick else WAITING_REQUESTS
            each = (await waiting_memory(system.stack, most))["bytes_each"]
            found["bytes of a waiting request"][name].append(each)


async def measure(trees: dict[str, Path], options: argparse.Namespace) -> Figures:
    """All blocks."""
    found: Figures = defaultdict(lambda: defaultdict(list))
    for number, names in orders(("old", "new"), options.blocks):
        await requests(names, trees, options, found)
        if MEMORY in options.modes:
            await memory(names, trees, options, found)
        shown = {name: round(values["new"][-1] / values["old"][-1], 3) for name, values in found.items()}
        log(f"block {number}, new ÷ old: {shown}")
    return found


def table(found: Figures) -> str:
    """One line for each measurement."""
    lines = [f"{'new ÷ old':36} {'median':>7} {'min':>7} {'max':>7} {'old':>9} {'new':>9}"]
    for name, values in found.items():
        ratio = ratios(values["new"], values["old"])
        medians = " ".join(f"{statistics.median(values[system]):9.4g}" for system in ("old", "new"))
        lines.append(f"{name:36} {ratio['median']:7.3f} {ratio['min']:7.3f} {ratio['max']:7.3f} {medians}")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", required=True, metavar="REV", help="the commit to compare with")
    parser.add_argument("--new", metavar="REV", help="in place of the working tree")
    parser.add_argument("--blocks", type=int, default=3, help="pairs of systems, one after the other")
    parser.add_argument("--pairs", type=int, default=20, help="turns of each system for one load")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--modes", nargs="+", choices=(*MODES, MEMORY), default=["whole", "streamed", MEMORY])
    parser.add_argument("--delay-ms", type=float, default=0, help="what the simulated engine waits before each token")
    parser.add_argument("--setting", action="append", default=[], metavar="NAME=VALUE", help="a setting of both")
    parser.add_argument(
        "--new-setting", action="append", default=[], metavar="NAME=VALUE", help="a setting of the new system alone"
    )
    parser.add_argument("--quick", action="store_true", help="one block with few turns: to see that it works")
    options = parser.parse_args()
    if options.quick:
        options.blocks, options.pairs = 1, 6
    return options


def main() -> int:
    """Measure, print."""
    options = arguments()
    with contextlib.ExitStack() as checkouts:
        trees = {"old": checkouts.enter_context(checkout(options.old))}
        trees["new"] = checkouts.enter_context(checkout(options.new)) if options.new else ROOT
        print(table(asyncio.run(measure(trees, options))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
