"""`forebay status`: the queue's numbers, the models and the workers, read from NATS without any service."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from forebay_cli import console
from forebay_cli.declarations import AsJson, DataDir, NatsUrl, synchronous
from forebay_cli.nats_connection import connected, target
from forebay_contracts.nats import presence, topology
from forebay_contracts.queueing.state_store import KeyValueStateStore
from forebay_contracts.queueing.status import ModelQueue, QueueStatus, queue_status
from forebay_contracts.version import VERSION
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import QueueUnavailable
from forebay_contracts.wire.heartbeats import ApiInfo, WorkerInfo

WATCH_INTERVAL_S = 1.0

NUMBERS_ACROSS = 3
"""Numbers of the queue side by side, so that 80 columns and 24 lines have room for the workers too."""

Seen = tuple[QueueStatus, list[WorkerInfo]]


@synchronous
async def status(
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Refresh every second; goes on while NATS is unreachable.")
    ] = False,
    data_dir: DataDir = None,
    nats_url: NatsUrl = None,
    as_json: AsJson = False,
) -> None:
    """Show the queue's numbers, the models and the workers."""
    at = target(data_dir, nats_url)
    async with connected(at) as link:
        states = KeyValueStateStore(link)

        async def look() -> Seen:
            workers = await presence.read(link, names.WORKERS_BUCKET, WorkerInfo)
            apis = await presence.read(link, names.APIS_BUCKET, ApiInfo)
            shared = await topology.live_limits(link, at.settings, at.settings.served_model)
            return await queue_status(link, states, at.settings, workers, apis, shared.live), workers

        if watch:
            await watching(look, as_json=as_json)
        seen = await look()
        server = link.server
    if as_json:
        console.print_json(_as_json(*seen) | {"server": server})
    else:
        console.print_tables(*tables(*seen))


async def watching(look: Callable[[], Awaitable[Seen]], *, as_json: bool) -> NoReturn:
    """Show what `look` returns every second. Where it fails, a terminal keeps the last tables below the reason."""
    # rich redraws on a terminal only.
    redraws = not as_json and console.stdout.is_terminal and not console.stdout.is_dumb_terminal
    last: list[Table] = []
    task = asyncio.current_task()
    with Live(console=console.stdout, auto_refresh=False) if redraws else contextlib.nullcontext() as live:
        while True:
            seen, error = None, ""
            try:
                seen = await look()
            except QueueUnavailable as exc:
                error = str(exc)
            made = tables(*seen) if seen else []
            if as_json:
                console.print_json(_as_json(*seen) if seen else {"error": error}, one_line=True)
            elif live is None:
                console.stdout.out(f"{time.strftime('%F %T')} {error}".rstrip())
                console.print_tables(*made)
            else:
                last = made or last
                live.update(Group(*([Text(error, style="red")] if error else []), *last), refresh=True)
            # Up to Python 3.11 `wait_for`, by which nats-py waits, can swallow the cancellation that Ctrl-C is.
            if task is not None and task.cancelling():
                raise asyncio.CancelledError
            await asyncio.sleep(WATCH_INTERVAL_S)


def _as_json(numbers: QueueStatus, workers: list[WorkerInfo]) -> dict[str, Any]:
    # In QueueStatus `workers` is a number. Here it is the list of them.
    return numbers.model_dump() | {"workers": [worker.model_dump(mode="json") for worker in workers]}


def tables(numbers: QueueStatus, workers: list[WorkerInfo]) -> list[Table]:
    """The tables for a person. The workers come first, since a small screen is cut below."""
    fields = numbers.model_dump(exclude={"workers", "workers_ready", "models", "differences"})
    differing = [console.table("Limits that differ", ("found",), [[one] for one in numbers.differences])]
    return [
        *(differing if numbers.differences else ()),
        console.table(
            f"Workers: {numbers.workers_ready} of {numbers.workers} ready",
            ("id", "busy", "status", "model", "engine"),
            [_worker_row(worker) for worker in workers],
        ),
        console.table(
            "Models",
            ("model", "waiting", "deferred", "processing/limit", "paused until"),
            list(map(_model_row, numbers.models)),
        ),
        console.pairs("Queue", fields, NUMBERS_ACROSS),
    ]


def _worker_row(worker: WorkerInfo) -> tuple[object, ...]:
    """The version is shown only where it differs from this command's: it costs a line for each worker."""
    version = worker.version if worker.version != VERSION else None
    engine = (worker.engine, worker.quantization, worker.device, version)
    return (
        worker.id,
        f"{worker.busy}/{worker.slots}",
        f"{worker.status.value}: {worker.progress}" if worker.progress else worker.status.value,
        worker.model,
        " ".join(part for part in engine if part),
    )


def _model_row(line: ModelQueue) -> tuple[object, ...]:
    paused = None if line.paused_until is None else time.strftime("%F %T", time.localtime(line.paused_until))
    return (line.model, line.waiting, line.deferred, f"{line.processing}/{line.max_concurrent}", paused)
