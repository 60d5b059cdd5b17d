"""`forebay status`: the queue's numbers and the workers as NATS has them, with no service asked."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from nats.errors import Error as NatsError
from nats.js.errors import NotFoundError
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from forebay_cli import console
from forebay_cli.connection import connected, settings
from forebay_contracts.nats import presence
from forebay_contracts.nats.connection import Connection
from forebay_contracts.queueing.state_store import KeyValueStateStore
from forebay_contracts.queueing.status import ModelQueue, QueueStatus, queue_status
from forebay_contracts.version import VERSION
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import QueueUnavailable
from forebay_contracts.wire.heartbeats import WorkerInfo

WATCH_INTERVAL_S = 1.0

NUMBERS_ACROSS = 3
"""Of the queue, side by side: 80 columns and 24 lines have room for the workers too."""


async def status(*, watch: bool, as_json: bool) -> None:
    """Print the queue's numbers and the workers, once or every second.

    Raises:
        QueueUnavailable: NATS does not answer; when watched, only where it does not at first.
    """
    read = settings()
    async with connected(read) as link:
        states = KeyValueStateStore(link)

        async def look() -> tuple[QueueStatus, list[WorkerInfo]]:
            alive = await workers(link)
            return await queue_status(link, states, read, alive), alive

        if not watch:
            numbers, alive = await look()
            if as_json:
                console.print_json(_as_json(numbers, alive))
                return
            for made in tables(numbers, alive):
                console.print_table(made)
            return
        with _shown(as_json=as_json) as show:
            while True:
                try:
                    show(await look(), "")
                except QueueUnavailable as exc:
                    show(None, str(exc))
                await asyncio.sleep(WATCH_INTERVAL_S)


async def workers(link: Connection) -> list[WorkerInfo]:
    """The workers that are alive.

    Raises:
        QueueUnavailable: NATS does not answer.
    """
    try:
        return await presence.read(link, names.WORKERS_BUCKET, WorkerInfo)
    except NotFoundError:
        return []
    except (NatsError, TimeoutError, OSError) as exc:
        raise QueueUnavailable("NATS did not answer") from exc


Seen = tuple[QueueStatus, list[WorkerInfo]]
Show = Callable[[Seen | None, str], None]
"""Shows what was seen, or why nothing could be."""


def _shown(*, as_json: bool) -> contextlib.AbstractContextManager[Show]:
    if as_json:
        return _as_json_lines()
    # A live display prints nothing elsewhere.
    drawn = console.stdout.is_terminal and not console.stdout.is_dumb_terminal
    return _on_terminal() if drawn else _as_text()


@contextlib.contextmanager
def _as_json_lines() -> Iterator[Show]:
    def show(seen: Seen | None, error: str) -> None:
        console.print_json(_as_json(*seen) if seen else {"error": error}, one_line=True)

    yield show


@contextlib.contextmanager
def _as_text() -> Iterator[Show]:
    def show(seen: Seen | None, error: str) -> None:
        console.stdout.out(f"{time.strftime('%F %T')} {error}".rstrip())
        for made in tables(*seen) if seen else ():
            console.print_table(made)

    yield show


@contextlib.contextmanager
def _on_terminal() -> Iterator[Show]:
    """One screen that is drawn again; while NATS is away, the last one under the reason."""
    last: Sequence[Table] = ()

    def show(seen: Seen | None, error: str) -> None:
        nonlocal last
        last = tables(*seen) if seen else last
        live.update(Group(*([Text(error, style="red")] if error else []), *last), refresh=True)

    with Live(console=console.stdout, auto_refresh=False) as live:
        yield show


def _as_json(numbers: QueueStatus, alive: list[WorkerInfo]) -> dict[str, Any]:
    # `workers` is a number in QueueStatus; here it is the workers themselves, whose number it was.
    return numbers.model_dump() | {"workers": [worker.model_dump(mode="json") for worker in alive]}


def tables(numbers: QueueStatus, alive: list[WorkerInfo]) -> list[Table]:
    """What a person sees: the workers first, since a small screen is cut below."""
    fields = numbers.model_dump(exclude={"workers", "workers_ready", "models"})
    return [
        console.table(
            f"Workers: {numbers.workers_ready} of {numbers.workers} ready",
            ("id", "busy", "status", "model", "engine"),
            [_worker_row(worker) for worker in alive],
        ),
        console.table(
            "Models", ("model", "waiting", "processing/limit", "paused until"), list(map(_model_row, numbers.models))
        ),
        console.pairs("Queue", fields, NUMBERS_ACROSS),
    ]


def _worker_row(worker: WorkerInfo) -> tuple[object, ...]:
    """Its version only where it is another than this command's: one line more for each worker otherwise."""
    other = worker.version if worker.version != VERSION else None
    engine = (worker.engine, worker.quantization, worker.device, other)
    return (
        worker.id,
        f"{worker.busy}/{worker.slots}",
        f"{worker.status.value}: {worker.progress}" if worker.progress else worker.status.value,
        worker.model,
        " ".join(part for part in engine if part),
    )


def _model_row(line: ModelQueue) -> tuple[object, ...]:
    paused = None if line.paused_until is None else time.strftime("%F %T", time.localtime(line.paused_until))
    return (line.model, line.waiting, f"{line.processing}/{line.max_concurrent}", paused)
