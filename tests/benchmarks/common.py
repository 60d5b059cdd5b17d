"""What all benchmarks share: processes in the background, load, CPU and memory, results with their stamp."""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results"
CACHE = ROOT / ".bench"
"""What `prepare.py` installs the peers into; git ignores it."""
SOURCES = [str(ROOT / path) for path in ("libs/contracts", "services/inference", "tests")]
START_TIMEOUT_S = 120
MODEL = "SmolLM2-135M-Instruct"

WRK_SCRIPT = HERE / "post.lua"


class Unavailable(Exception):
    """A peer cannot be had on this machine; the message says why."""


def log(text: str) -> None:
    """Progress, on stderr."""
    print(f"[{datetime.now(UTC):%H:%M:%S}] {text}", file=sys.stderr, flush=True)


def peer_python(venv: str) -> str:
    """The interpreter of a peer's environment; raises Unavailable where `prepare.py` could not make it."""
    python = CACHE / "venvs" / venv / "bin" / "python"
    if not (CACHE / "venvs" / f"{venv}.ready").exists():
        raise Unavailable(f"{venv} is not installed: `make bench-prepare` says why")
    return str(python)


def free_port() -> int:
    """A port of the loopback interface that nobody uses now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


class Background:
    """A process and its children, ended with the block; its output is shown where it does not start."""

    def __init__(self, name: str, command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        self.name = name
        self._command = command
        self._env = env
        # To append, since the process shares the place in it that is read from. Closed in __exit__.
        self._log = tempfile.TemporaryFile("a+b")  # noqa: SIM115

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._command,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(SOURCES)} | dict(self._env or {}),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        self.process = psutil.Process(self._process.pid)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.go_on()
        family = [*self.family()]
        for member in family:
            _quietly(member.terminate)
        _, alive = psutil.wait_procs(family, timeout=5)
        for member in alive:
            _quietly(member.kill)
        self._process.wait()
        self._log.close()

    def family(self) -> list[psutil.Process]:
        """The process and all below it."""
        try:
            return [self.process, *self.process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def hold(self) -> None:
        """Stop it, so that it takes nothing from the one whose turn it is."""
        for member in self.family():
            _quietly(member.suspend)

    def go_on(self) -> None:
        """Let it run again."""
        for member in self.family():
            _quietly(member.resume)

    def wait_for_port(self, port: int, timeout_s: float = START_TIMEOUT_S) -> None:
        """Wait until it listens, which leaves no event to wait for."""
        give_up_at = time.monotonic() + timeout_s
        while True:
            if self._process.poll() is not None or time.monotonic() > give_up_at:
                raise RuntimeError(f"{self.name} did not start:\n{self.output()[-4000:]}")
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                return
            except OSError:
                time.sleep(0.1)

    def wait(self, timeout_s: float) -> None:
        """Wait for its end; raises RuntimeError where that is none that it should have had."""
        try:
            status = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{self.name} took more than {timeout_s} s:\n{self.output()[-4000:]}") from None
        if status:
            raise RuntimeError(f"{self.name} ended with {status}:\n{self.output()[-4000:]}")

    def output(self) -> str:
        """What it has printed."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")


def _quietly(call: Callable[[], Any]) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        call()


async def run_json(*command: str) -> dict[str, Any]:
    """The JSON that a command prints last."""
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    output, errors = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"{command} ended with {process.returncode}:\n{errors.decode(errors='replace')[-4000:]}")
    figures: dict[str, Any] = json.loads(output.splitlines()[-1])
    return figures


async def drive(port: int, clients: int, seconds: float, **options: Any) -> dict[str, Any]:
    """The figures of `driver.py`; an option is its flag, with `_` for `-`."""
    flags: list[str] = []
    for name, value in options.items():
        if value is False or value is None:
            continue
        flags.append(f"--{name.replace('_', '-')}")
        if value is not True:
            flags.append(str(value))
    figures = await run_json(sys.executable, str(HERE / "driver.py"), str(port), str(clients), str(seconds), *flags)
    if figures["bad"]:
        raise RuntimeError(f"{figures['bad']} answers were not whole, such as {figures['example']!r}")
    return figures


async def wrk(port: int, clients: int, seconds: int, tokens: int = 5) -> dict[str, Any]:
    """The same figures by wrk: answers that are not streamed, closed loop."""
    if shutil.which("wrk") is None:
        raise Unavailable("wrk is missing (Debian: apt-get install wrk)")
    figures = await run_json(
        *("wrk", "-t1", f"-c{clients}", f"-d{seconds}s", "--timeout", "30s", "-s", str(WRK_SCRIPT)),
        *(f"http://127.0.0.1:{port}/v1/chat/completions", MODEL, str(tokens)),
    )
    if figures["requests"] == 0:
        raise RuntimeError(f"wrk got no answer from port {port}: {figures}")
    return figures


def cpu_s(processes: Iterable[psutil.Process]) -> float:
    """CPU seconds of processes so far, their children that live included."""
    used = 0.0
    for process in processes:
        for member in (process, *process.children(recursive=True)):
            try:
                used += sum(member.cpu_times()[:2])
            except psutil.NoSuchProcess:
                continue
    return used


def memory_mb(pid: int) -> dict[str, float]:
    """Memory of a process in MB (10⁶ bytes): all that is resident, and what no other process shares."""
    full = psutil.Process(pid).memory_full_info()
    return {"rss": round(full.rss / 1e6, 2), "uss": round(full.uss / 1e6, 2)}


def spread(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    """Median, least and most."""
    return {
        "median": round(statistics.median(values), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
    }


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Ours divided by theirs, each of the same round."""
    return spread([mine / other for mine, other in zip(ours, theirs, strict=True)])


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the straight line that fits best."""
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def stamp() -> dict[str, Any]:
    """Where, when and on what code figures were made."""

    def git(*arguments: str) -> str:
        done = subprocess.run(("git", *arguments), cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    served = ("services", "libs")
    changed = bool(git("status", "--porcelain", "--untracked-files=no", "--", *served))
    return {
        "commit": git("rev-parse", "--short=10", "HEAD") + ("+" if changed else ""),
        "at": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "cores": psutil.cpu_count(),
        "cpu": _cpu_name(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "load_before": round(os.getloadavg()[0], 2),
        "versions": {"python": platform.python_version(), "nats-server": _nats_version()}
        | {name: version(name) for name in ("nats-py", "uvloop", "uvicorn", "torch", "transformers")},
    }


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _nats_version() -> str:
    binary = shutil.which("nats-server", path=str(Path(sys.executable).parent)) or "nats-server"
    done = subprocess.run((binary, "-v"), capture_output=True, text=True, check=False)
    return done.stdout.strip().rpartition("v")[2]


def part_main(
    part: str, budget_s: float, measure: Callable[..., Awaitable[dict[str, Any]]], text: str, **choices: Sequence[str]
) -> int:
    """The command line of one part: measure, write `results/PART.json`, print where.

    Each of `choices` is an option as well, and an argument of `measure`. Its first value is the default; the result of
    another is in a file with its name, as `results/PART-VALUE.json`.
    """
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short slices and few rounds: to see that it works")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON")
    for name, values in choices.items():
        parser.add_argument(f"--{name}", choices=values, default=values[0])
    options = parser.parse_args()
    chosen = {name: getattr(options, name) for name in choices}
    part = "-".join([part, *(value for name, value in chosen.items() if value != choices[name][0])])
    log(f"{part}: at most {budget_s:.0f} s are planned" + (" in full; this is a quick run" if options.quick else ""))
    return write_part(
        part, budget_s, options.quick, options.results, lambda: asyncio.run(measure(options.quick, **chosen))
    )


def write_part(part: str, budget_s: float, quick: bool, results: Path, measure: Callable[[], dict[str, Any]]) -> int:
    """Measure, write `PART.json` in the folder `results` with a stamp, say where."""
    header, began = stamp(), time.monotonic()
    figures = measure()
    took_s = time.monotonic() - began
    header |= {"part": part, "quick": quick, "took_s": round(took_s), "budget_s": budget_s}
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"{part}.json"
    path.write_text(json.dumps({"stamp": header, "figures": figures}, indent=1) + "\n")
    log(f"{part}: {took_s:.0f} s, {path}")
    return 0
