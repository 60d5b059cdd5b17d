"""`forebay topology`: the live streams, buckets and consumers shown, and made what the settings say."""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from typing import Any

from nats.errors import Error as NatsError
from nats.js.api import ConsumerInfo, StreamInfo
from nats.js.errors import NotFoundError
from rich.table import Table

from forebay_cli import console
from forebay_cli.commands import status
from forebay_cli.connection import NotPermitted, connected, settings
from forebay_contracts.nats import permissions, topology
from forebay_contracts.nats.connection import Connection
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import ConfigurationError, QueueUnavailable
from forebay_contracts.wire.heartbeats import WorkerInfo, WorkerStatus


async def apply(model: str | None, *, dry_run: bool, as_json: bool) -> None:
    """Make streams, buckets and the consumer of `model` (None: of DEFAULT_MODEL) what the settings say.

    Prints what was changed, or with `dry_run` what would be.

    Raises:
        ConfigurationError: it would make a consumer for a model that nobody has named.
        NotPermitted: this NATS user may not change the topology.
        QueueUnavailable: NATS does not answer.
    """
    read = settings()
    named = model is not None or not {"default_model", "model_name"}.isdisjoint(read.model_fields_set)
    model = model or read.served_model
    # Of another model than the settings', nobody here knows the aliases: what its workers wrote stays.
    aliases = read.served_aliases if model == read.served_model else None
    async with connected(read) as link:
        if not dry_run:
            await _refuse_who_may_not(link)
        if not named:
            await _refuse_a_new_one(link, model)
        if dry_run:
            changes = await topology.drift(link, read, model) + await _alias_drift(link, model, aliases)
        else:
            changes = await topology.ensure(link, read, model, aliases)
        alive: list[WorkerInfo] = []
        # A cluster that has only just made the bucket may not answer for it yet, and all is done already.
        with contextlib.suppress(QueueUnavailable):
            alive = await status.workers(link)
        short = short_of_slots(model, read.max_concurrent_requests, alive)
    if as_json:
        console.print_json({"changes": changes, "warnings": [short] if short else []})
        return
    for line in (*(changes or ["nothing to change"]), *([short] if short else [])):
        console.stdout.print(line, markup=False)


def short_of_slots(model: str, limit: int, alive: Sequence[WorkerInfo]) -> str | None:
    """A sentence where the workers of `model` cannot run as many requests as its limit allows; None without workers."""
    serving = [worker for worker in alive if worker.model == model and worker.status is not WorkerStatus.DRAINING]
    slots = sum(worker.slots for worker in serving)
    if not serving or slots >= limit:
        return None
    return (
        f"{model} may run {limit} at once, but its workers have {slots} slot{'' if slots == 1 else 's'} in all: "
        f"start more, or restart them with the new setting"
    )


async def _refuse_a_new_one(link: Connection, model: str) -> None:
    """Without its environment this command knows the default of DEFAULT_MODEL alone, which may be nobody's model."""
    give_up_at = time.monotonic() + topology.START_PATIENCE_S
    while True:
        try:
            known = [_model(consumer) for consumer in await topology.consumers(link)]
            break
        except NotFoundError:
            return  # nothing is there yet, as where there are no models: it begins with the default
        except (NatsError, TimeoutError, OSError) as exc:
            # A cluster that has just been started has no leader yet.
            if time.monotonic() >= give_up_at:
                raise QueueUnavailable("NATS did not answer") from exc
        await asyncio.sleep(topology.START_RETRY_S)
    if known and model not in known:
        raise ConfigurationError(
            f"neither DEFAULT_MODEL nor --model is given, and {model} is not among the models here "
            f"({', '.join(known)}): run it with the deployment's whole environment"
        )


async def _alias_drift(link: Connection, model: str, aliases: Sequence[str] | None) -> list[str]:
    known = await topology.known_models(link)
    if aliases is None or model not in known or known[model] == tuple(aliases):
        return []
    change = f"{names.ALIASES_METADATA} {','.join(known[model])} → {','.join(aliases)}"
    return [f"consumer {names.model_token(model)}: {change}"]


async def _refuse_who_may_not(link: Connection) -> None:
    own = await permissions.own(link)
    if own is not None and not own.publish.permit(f"$JS.API.STREAM.CREATE.{names.STREAM}"):
        raise NotPermitted(
            "this NATS user may not change streams or consumers: use `admin` of deploy/nats/forebay.conf; "
            "--dry-run says what would change"
        )


async def show(*, as_json: bool) -> None:
    """Print the live streams, buckets and consumers with their limits."""
    read = settings()
    async with connected(read) as link:
        try:
            owned = [config.name for config in topology.stream_configs(read)]
            streams = await asyncio.gather(*(link.jetstream.stream_info(name) for name in owned))
            consumers = await topology.consumers(link)
        except NotFoundError as exc:
            raise QueueUnavailable("the topology is not (all) there yet: `forebay topology apply` makes it") from exc
        except (NatsError, TimeoutError) as exc:
            raise QueueUnavailable("NATS did not answer") from exc
    stream_rows, consumer_rows = [_stream_row(info) for info in streams], [_consumer_row(info) for info in consumers]
    if as_json:
        console.print_json({"streams": stream_rows, "consumers": consumer_rows})
        return
    console.print_table(_table_of("Streams and buckets", stream_rows))
    console.print_table(_table_of("Consumers, one a model", consumer_rows))


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
        "model": _model(info),
        "max_ack_pending": config.max_ack_pending,
        "pending": info.num_pending,
        "ack_pending": info.num_ack_pending,
        "redelivered": info.num_redelivered,
        "pulls_waiting": info.num_waiting,
        "ack_wait_s": config.ack_wait,
        "paused_until": config.pause_until if info.paused else None,
    }


def _table_of(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    columns = list(rows[0]) if rows else [""]
    return console.table(title, columns, [list(row.values()) for row in rows])


def _model(consumer: ConsumerInfo) -> str:
    return str((consumer.config.metadata or {}).get(names.MODEL_METADATA, consumer.name))
