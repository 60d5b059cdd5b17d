"""`forebay topology`: the live streams, buckets and consumers, shown or brought in line with the settings."""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from nats.js.api import ConsumerInfo, StreamInfo
from nats.js.errors import NotFoundError
from rich.table import Table

from forebay_cli import console
from forebay_cli.declarations import AsJson, DataDir, NatsUrl, synchronous
from forebay_cli.nats_connection import NotPermitted, connected, target
from forebay_contracts.nats import presence
from forebay_contracts.nats.connection import Connection
from forebay_contracts.nats.consumers import consumers, model_of
from forebay_contracts.nats.streams import stream_configs
from forebay_contracts.nats.topology import (
    START_PATIENCE_S,
    START_RETRY_S,
    drift,
    ensure,
    live_limits,
    may_change,
)
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import ConfigurationError, QueueUnavailable
from forebay_contracts.wire.heartbeats import WorkerInfo, WorkerStatus

WIDE_COLUMNS = ("subjects", "last_seq", "retention", "discard", "storage", "model", "redelivered", "pulls_waiting")
"""What is left out of the tables where the terminal is narrow."""

topology = typer.Typer(
    help="Show or apply the streams, consumers and buckets on NATS.", no_args_is_help=True, add_completion=False
)


@topology.command()
@synchronous
async def apply(
    model: Annotated[
        str | None,
        typer.Option(help="Whose consumer: the model's name for clients.", show_default="DEFAULT_MODEL's"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the changes, but make none.")] = False,
    data_dir: DataDir = None,
    nats_url: NatsUrl = None,
    as_json: AsJson = False,
) -> None:
    """Bring streams, buckets and the consumer of one model in line with the settings. No message is lost.

    It applies the limits that the environment sets: run it with the deployment's whole environment, once for each
    model. The next start of a service reverts what its own environment sets otherwise.
    """
    at = target(data_dir, nats_url)
    read = at.settings
    is_named = model is not None or not {"default_model", "model_name"}.isdisjoint(read.model_fields_set)
    model = model or read.served_model
    # The settings have the names of their own model only. Another model keeps those that its workers wrote.
    own = model == read.served_model
    aliases, adapters = (read.served_aliases, read.model_adapters) if own else (None, None)
    async with connected(at if dry_run else at.named()) as link:
        if not dry_run and not await may_change(link):
            raise NotPermitted(
                "this NATS user may not change streams or consumers: use `admin` of deploy/nats/forebay.conf; "
                "--dry-run says what would change"
            )
        if not is_named:
            await _require_known(link, model)
        changes = await (drift if dry_run else ensure)(link, read, model, aliases, adapters)
        stays = [] if dry_run else (await live_limits(link, read, model)).differences()
        workers: list[WorkerInfo] = []
        # A cluster that has just made the bucket may not answer for it yet. The changes are made all the same.
        with contextlib.suppress(QueueUnavailable):
            workers = await presence.read(link, names.WORKERS_BUCKET, WorkerInfo)
    warnings = [*stays, *_too_few_slots(model, read.max_concurrent_requests, workers)]
    text = "\n".join((*(changes or ["nothing to change"]), *warnings))
    console.print_result({"changes": changes, "warnings": warnings, "server": link.server}, text, as_json=as_json)


@topology.command()
@synchronous
async def show(data_dir: DataDir = None, nats_url: NatsUrl = None, as_json: AsJson = False) -> None:
    """Show streams, consumers and buckets with their live limits."""
    at = target(data_dir, nats_url)
    async with connected(at) as link:
        try:
            owned = [config.name for config in stream_configs(at.settings)]
            streams = await asyncio.gather(*(link.jetstream.stream_info(name) for name in owned))
        except NotFoundError as exc:
            raise QueueUnavailable("the topology is not complete yet: `forebay topology apply` makes it") from exc
        stream_rows = [_stream_row(info) for info in streams]
        consumer_rows = [_consumer_row(info) for info in await consumers(link)]
    if as_json:
        console.print_json({"streams": stream_rows, "consumers": consumer_rows, "server": link.server})
        return
    console.print_tables(_table("Streams and buckets", stream_rows), _table("Consumers, one a model", consumer_rows))


async def _require_known(link: Connection, model: str) -> None:
    """Refuse a consumer for the built-in default of DEFAULT_MODEL where other models have one: nobody may serve it."""
    give_up_at = time.monotonic() + START_PATIENCE_S
    while True:
        try:
            known = [model_of(consumer) for consumer in await consumers(link)]
            break
        except QueueUnavailable:
            # A cluster that has just started has no leader yet.
            if time.monotonic() >= give_up_at:
                raise
        await asyncio.sleep(START_RETRY_S)
    if known and model not in known:
        raise ConfigurationError(
            f"neither DEFAULT_MODEL nor --model is given, and {model} is not among the models here "
            f"({', '.join(known)}): run it with the deployment's whole environment"
        )


def _too_few_slots(model: str, limit: int, workers: Sequence[WorkerInfo]) -> list[str]:
    """A warning where the workers of `model` have fewer slots than its limit; none where it has no worker."""
    serving = [worker for worker in workers if worker.model == model and worker.status is not WorkerStatus.DRAINING]
    slots = sum(worker.slots for worker in serving)
    if not serving or slots >= limit:
        return []
    return [
        f"{model} may run {limit} at once, but its workers have {slots} slot{'' if slots == 1 else 's'} in all: "
        f"start more, or restart them with the new setting"
    ]


def _stream_row(info: StreamInfo) -> dict[str, Any]:
    config, state = info.config, info.state
    return {
        "name": config.name,
        "subjects": " ".join(config.subjects or ()),
        "messages": state.messages,
        "max_msgs": config.max_msgs,
        "last_seq": state.last_seq,
        "bytes": state.bytes,
        "retention": config.retention,
        "discard": config.discard,
        "storage": config.storage,
        "max_age_s": config.max_age,
        "replicas": config.num_replicas,
    }


def _consumer_row(info: ConsumerInfo) -> dict[str, Any]:
    config = info.config
    return {
        "name": info.name,
        "model": model_of(info),
        "max_ack_pending": config.max_ack_pending,
        "pending": info.num_pending,
        "ack_pending": info.num_ack_pending,
        "redelivered": info.num_redelivered,
        "pulls_waiting": info.num_waiting,
        "ack_wait_s": config.ack_wait,
        "paused_until": config.pause_until if info.paused else None,
    }


def _table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    """All of `rows`, or on a narrow terminal the columns that people look for first."""
    made = console.table(title, list(rows[0]) if rows else [""], [list(row.values()) for row in rows])
    if not rows or console.needed_width(made) <= console.stdout.width:
        return made
    shown = [name for name in rows[0] if name not in WIDE_COLUMNS]
    return console.table(f"{title} (--json has more)", shown, [[row[name] for name in shown] for row in rows])
