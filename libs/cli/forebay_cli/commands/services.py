"""`forebay api`, `inference` and `fetch`: one service in the foreground."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from forebay_contracts import extras

Folder = Annotated[Path | None, typer.Option("--data-dir", help="Models and logs.", show_default="DATA_DIR")]

NatsUrl = Annotated[
    str | None, typer.Option(help="The NATS server.", show_default="NATS_URL, else that of `forebay up` on DATA_DIR")
]


def api(data_dir: Folder = None, nats_url: NatsUrl = None) -> None:
    """Run the api in the foreground, for containers."""
    extras.require("api")
    _become("forebay_api", _with_nats(data_dir, nats_url))


def inference(data_dir: Folder = None, nats_url: NatsUrl = None) -> None:
    """Run one worker in the foreground, for containers."""
    _require_engine()
    _become("forebay_inference", _with_nats(data_dir, nats_url))


def fetch(
    link: Annotated[Path | None, typer.Option(help="Make this a symbolic link to it, for a server beside.")] = None,
    data_dir: Folder = None,
) -> None:
    """Fetch and convert the model into DATA_DIR, then exit. Run it before the first worker or in an init container."""
    _require_engine()
    given = {} if data_dir is None else {"DATA_DIR": str(data_dir)}
    _become("forebay_inference.fetch", given, *([] if link is None else [str(link)]))


def _require_engine() -> None:
    """Find out whether anything of an engine is installed. The service finds out whether it is the right one."""
    if find_spec("jinja2") is None:
        from forebay_contracts.settings import InferenceSettings, load  # here, since it takes 0.3 s

        extras.require(load(InferenceSettings).inference_engine)


def _become(module: str, settings: dict[str, str], *arguments: str) -> None:
    # The service replaces this process: its signals, output and exit code are the container's.
    os.execve(sys.executable, [sys.executable, "-m", module, *arguments], os.environ | settings)


def _with_nats(data_dir: Path | None = None, nats_url: str | None = None) -> dict[str, str]:
    """The settings that the options give, and without NATS_URL those of the `forebay up` that runs on DATA_DIR."""
    given: dict[str, object] = {"DATA_DIR": data_dir, "NATS_URL": nats_url}
    if not (nats_url or os.environ.get("NATS_URL")):
        # Imported here, since it takes 0.3 s and containers have NATS_URL.
        from forebay_cli.local.running import ACCESS
        from forebay_cli.nats_connection import target

        read = target(data_dir).named().settings
        given |= {name.upper(): getattr(read, name) for name in ACCESS}
    return {name: str(value) for name, value in given.items() if value is not None}
