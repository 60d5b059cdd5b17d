"""`forebay run`: a chat with a model that is started for it, unless a `forebay up` runs already."""

import contextlib
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Annotated, Final

import httpx
import typer

from forebay_cli import console
from forebay_cli.api_client import ApiKey, api_client, api_target
from forebay_cli.commands.chat import ANSWER_TIMEOUT_S, talk
from forebay_cli.local.addresses import why_not_listen
from forebay_cli.local.running import running
from forebay_contracts.settings import ApiSettings, load
from forebay_contracts.wire.errors import ConfigurationError, ForebayError

LAST_LINES: Final = 20
"""Lines of `up` that are kept, to be printed if it does not start."""


class NotStarted(ForebayError):
    """`forebay up` ended before it was ready."""


def run(
    model: Annotated[str, typer.Argument(help="Hub id, folder or GGUF file.")],
    message: Annotated[str | None, typer.Argument(help="The question; without it, a conversation.")] = None,
    engine: Annotated[
        str | None, typer.Option(help="What runs the model, if it is started.", show_default="INFERENCE_ENGINE")
    ] = None,
    api_key: ApiKey = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder of `forebay up`.", show_default="DATA_DIR")] = None,
) -> None:
    """Chat with a model on this machine; starts it for that if nobody has.

    If a `forebay up` runs on DATA_DIR, its model is asked. Otherwise one is started, and stopped at the end.
    """
    given = {} if data_dir is None else {"data_dir": data_dir}
    settings = load(ApiSettings, default_model=model, **given)
    if running(settings.data_dir) is not None:
        with api_client(api_target(None, api_key, settings.data_dir), ANSWER_TIMEOUT_S) as client:
            _require_served(client, settings.served_model, settings.data_dir)
            talk(client, settings.served_model, message)
        return
    with (
        _started(model, engine, settings) as url,
        api_client(api_target(url, api_key), ANSWER_TIMEOUT_S) as client,
    ):
        talk(client, settings.served_model, message)


def _require_served(client: httpx.Client, model: str, data_dir: Path) -> None:
    served = [one for one in client.get("models").json()["data"] if one["status"] != "no_worker"]
    if not any(model in (one["id"], *one["aliases"]) for one in served):
        raise ConfigurationError(
            f"`forebay up` on {data_dir} serves {', '.join(one['id'] for one in served)} and not {model}: "
            f"stop it and start it with --model {model}, or give another --data-dir"
        )


@contextlib.contextmanager
def _started(model: str, engine: str | None, settings: ApiSettings) -> Iterator[str]:
    """A `forebay up` for the length of a block; gives the URL of its api. It ends with this process too."""
    port = settings.api_port if why_not_listen(settings.api_host, settings.api_port) is None else 0
    options = ["--model", model, "--port", str(port), "--data-dir", str(settings.data_dir)]
    options += [] if engine is None else ["--engine", engine]
    watched = [sys.executable, "-m", "forebay_contracts.parent_death", str(os.getpid())]
    process = subprocess.Popen(
        [*watched, sys.executable, "-m", "forebay_cli", "up", *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C stops an answer, and not what makes it
    )
    assert process.stdout is not None
    assert process.stderr is not None
    starting = _Starting(process.stderr)
    try:
        word, _, url = process.stdout.readline().strip().partition(" ")
        starting.over(failed=word != "ready")
        yield url
    finally:
        _end(process)
        process.stdout.close()


class _Starting:
    """Shows what `up` says until it is ready. After that, its log files have it."""

    def __init__(self, lines: IO[str]) -> None:
        self._lines = lines
        self._progress = console.Progress()
        self._shows = True
        self._lock = threading.Lock()
        self._last: deque[str] = deque(maxlen=LAST_LINES)
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()

    def _read(self) -> None:
        with self._lines:
            for line in self._lines:
                self._last.append(line.rstrip())
                with self._lock:
                    if self._shows and not line.startswith("forebay: "):
                        self._progress.show(line.rstrip())

    def over(self, *, failed: bool) -> None:
        """Show no more; raises NotStarted if it has `failed`."""
        if failed:
            self._reading.join()
        with self._lock:
            self._shows = False
            self._progress.stop()
        if failed:
            said = [line.removeprefix("forebay: ") for line in self._last if line.startswith(("forebay: ", "    "))]
            raise NotStarted("\n".join(said) or "`forebay up` did not start")


def _end(process: subprocess.Popen[str]) -> None:
    """Have `up` end in order; on Ctrl-C, at once."""
    process.terminate()
    try:
        process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
