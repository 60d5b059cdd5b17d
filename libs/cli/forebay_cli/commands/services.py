"""`forebay api`, `inference` and `fetch`: one service in the foreground."""

import os
import sys


def api() -> None:
    """Run the api in the foreground, for containers."""
    _become("forebay_api")


def inference() -> None:
    """Run one worker in the foreground, for containers."""
    _become("forebay_inference")


def fetch() -> None:
    """Fetch and convert the model into DATA_DIR, then exit. Run it before the first worker or in an init container."""
    _become("forebay_inference.fetch")


def _become(module: str) -> None:
    # The service replaces this process: its signals, output and exit code are the container's.
    os.execv(sys.executable, [sys.executable, "-m", module])
