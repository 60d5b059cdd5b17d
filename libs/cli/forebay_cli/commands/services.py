"""`forebay api`, `inference` and `fetch`: one service in the foreground."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer


def api() -> None:
    """Run the api in the foreground, for containers."""
    _become("forebay_api", _embedded_nats())


def inference() -> None:
    """Run one worker in the foreground, for containers."""
    _become("forebay_inference", _embedded_nats())


def fetch(
    link: Annotated[Path | None, typer.Option(help="Make this a symbolic link to it, for a server beside.")] = None,
) -> None:
    """Fetch and convert the model into DATA_DIR, then exit. Run it before the first worker or in an init container."""
    _become("forebay_inference.fetch", {}, *([] if link is None else [str(link)]))


def _become(module: str, settings: dict[str, str], *arguments: str) -> None:
    # The service replaces this process: its signals, output and exit code are the container's.
    os.execve(sys.executable, [sys.executable, "-m", module, *arguments], os.environ | settings)


def _embedded_nats() -> dict[str, str]:
    """Without NATS_URL, the settings of the server of the `forebay up` that runs on DATA_DIR."""
    if os.environ.get("NATS_URL"):
        return {}
    # Imported here, since it takes 0.3 s and containers have NATS_URL.
    from forebay_cli.nats_connection import load_settings

    read = load_settings()
    access = {"NATS_URL": read.nats_url, "NATS_NKEY_SEED": read.nats_nkey_seed}
    return {name: str(value) for name, value in access.items() if value is not None}
