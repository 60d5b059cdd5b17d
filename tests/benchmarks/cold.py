"""Start, idle and size: `forebay up` with a model that is there already.

    python tests/benchmarks/cold.py [--quick]

From the clone on it is `make run`, whose installation's time is the package index's, and then this.
"""

import asyncio
import contextlib
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import httpx
import psutil

from benchmarks.common import ROOT, Background, free_port, memory_mb, part_main
from benchmarks.systems import default_model
from benchmarks.tokens import Server, ask
from forebay_contracts.settings import InferenceSettings
from support.stack import data_dir

BUDGET_S = 60


def size_mb(folder: Path) -> float:
    """Of all files below."""
    return round(sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6, 1)


def called(process: psutil.Process) -> str:
    """What a process is, by its command line."""
    line = " ".join(process.cmdline())
    return next((name for name in ("nats-server", "forebay_api", "forebay_inference") if name in line), "forebay up")


async def measure(quick: bool) -> dict[str, Any]:
    """One start, one token, then nothing."""
    settings = InferenceSettings(_env_file=None)
    model = await default_model()
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [str(Path(sys.executable).parent / "forebay"), "up", "--port", str(port)]
    with contextlib.ExitStack() as stack:
        # What is kept of requests is new, the model is not.
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        (Path(folder) / "models").symlink_to(data_dir() / "models")
        began = time.perf_counter()
        up = stack.enter_context(Background("forebay up", command, {"DATA_DIR": folder}))
        async with httpx.AsyncClient(timeout=60) as http, asyncio.timeout(120):
            while f"ready {url}" not in up.output():
                if not up.process.is_running() or up.process.status() == psutil.STATUS_ZOMBIE:
                    raise RuntimeError(up.output()[-2000:])
                await asyncio.sleep(0.05)
            ready_s = time.perf_counter() - began
            await ask(http, Server(url, settings.served_model), "Say hello.", 4)
            first_s = time.perf_counter() - began
        seconds = 5 if quick else 20
        family = up.family()
        before = {one.pid: sum(one.cpu_times()[:2]) for one in family}
        await asyncio.sleep(seconds)
        idle = [
            {
                "process": called(one),
                "cpu_percent": round(100 * (sum(one.cpu_times()[:2]) - before[one.pid]) / seconds, 2),
                **memory_mb(one.pid),
            }
            for one in family
            if one.is_running()
        ]
    return {
        "ready_s": round(ready_s, 2),
        "first_answer_s": round(first_s, 2),
        "idle_seconds": seconds,
        "idle": idle,
        "venv_mb": size_mb(ROOT / ".venv"),
        "model_mb": size_mb(model),
    }


if __name__ == "__main__":
    sys.exit(part_main("cold", BUDGET_S, measure, __doc__ or ""))
