"""`make bench-prepare`: all that a full run needs under `.bench/`: peers in environments of their own, and weights.

What cannot be had is named with the reason, and the benchmarks go on without it. wrk and redis-server are the
system's: `apt-get install wrk redis-server`.
"""

import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import CACHE, log
from forebay_contracts.settings import InferenceSettings
from forebay_contracts.wire.errors import ConfigurationError
from forebay_inference.models.store import ensure_gguf, ensure_model
from support.stack import data_dir

PEERS = {
    "queues": [
        *("taskiq==0.13.0", "taskiq-nats==0.7.0", "taskiq-redis==1.2.4", "celery[redis]==5.7.0", "nats-py==2.16.0"),
        *("starlette==1.10.0", "uvicorn==0.54.0", "uvloop==0.23.0", "httptools", "orjson==3.13.0", "pydantic==2.14.4"),
    ],
    "litellm": ["litellm[proxy]==1.108.7", "uvloop==0.23.0", "httptools"],
    "aiperf": ["aiperf==0.13.0"],
}


def prepare(name: str, requirements: list[str]) -> bool:
    """Make one environment; whether it is there."""
    ready, folder = CACHE / "venvs" / f"{name}.ready", CACHE / "venvs" / name
    if ready.exists():
        log(f"{name}: there already")
        return True
    log(f"{name}: installing {' '.join(requirements)}")
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    command = [str(folder / "bin" / "python"), "-m", "pip", "install", "-q", *requirements]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        log(f"{name}: not to be had:\n{done.stderr[-2000:]}")
        return False
    ready.touch()
    return True


def model() -> bool:
    """Whether the default model is there, as a checkpoint and as a GGUF file."""
    name = InferenceSettings(_env_file=None).default_model
    try:
        for ensure in (ensure_model, ensure_gguf):
            ensure(name, data_dir(), log)
    except (OSError, ConfigurationError) as exc:
        log(f"{name}: not to be had: {exc}")
        return False
    return True


def main() -> int:
    """Make all; 1 where something is missing."""
    found = [prepare(name, requirements) for name, requirements in PEERS.items()]
    found.append(model())
    for program in ("wrk", "redis-server"):
        found.append(shutil.which(program) is not None)
        if not found[-1]:
            log(f"{program} is missing: apt-get install {program}")
    return 0 if all(found) else 1


if __name__ == "__main__":
    sys.exit(main())
