"""`forebay pause` and `forebay resume`: JetStream's pause of a model's consumer."""

from datetime import UTC, datetime
from typing import Annotated

import typer
from nats.js.api import ConsumerInfo

from forebay_cli import console
from forebay_cli.declarations import AsJson, DataDir, NatsUrl, duration_s, synchronous
from forebay_cli.nats_connection import connected, target
from forebay_contracts.nats import clock
from forebay_contracts.nats.connection import Connection
from forebay_contracts.nats.consumers import aliases_of, consumers, model_of
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import ConfigurationError, ModelNotFound

UNTIL_RESUMED_S = 100 * 365 * 86_400
"""A pause without an end: JetStream requires one."""

MAX_PAUSE_S = 365 * 86_400
"""The longest pause with an end."""

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Its name, an alias, or its consumer.")]


@synchronous
async def pause(
    model: Model,
    for_s: Annotated[
        float | None,
        typer.Option(
            "--for",
            help="How long: 90s, 10m or 2h; at most 365d.",
            parser=duration_s,
            metavar="DURATION",
            show_default="until it is resumed",
        ),
    ] = None,
    data_dir: DataDir = None,
    nats_url: NatsUrl = None,
    as_json: AsJson = False,
) -> None:
    """Stop handing out requests of a model. New ones wait, running ones go on."""
    if for_s is not None and not 0 < for_s <= MAX_PAUSE_S:
        raise ConfigurationError("--for must be above 0s and at most 365d; without it, `forebay resume` ends a pause")
    async with connected(target(data_dir, nats_url).named()) as link:
        consumer = await _consumer(link, model)
        until = datetime.fromtimestamp(clock.now() + (for_s or UNTIL_RESUMED_S), UTC)
        await link.jetstream.pause_consumer(names.STREAM, consumer.name, until.isoformat().replace("+00:00", "Z"))
    running = consumer.num_ack_pending or 0
    end = f"until {until.astimezone():%F %T}" if for_s else "until it is resumed"
    console.print_result(
        {"model": model_of(consumer), "paused_until": until.timestamp(), "running": running, "server": link.server},
        f"paused {model_of(consumer)} {end}; {running} still run",
        as_json=as_json,
    )


@synchronous
async def resume(model: Model, data_dir: DataDir = None, nats_url: NatsUrl = None, as_json: AsJson = False) -> None:
    """Hand out requests of a paused model again."""
    async with connected(target(data_dir, nats_url).named()) as link:
        consumer = await _consumer(link, model)
        await link.jetstream.resume_consumer(names.STREAM, consumer.name)
    waiting = consumer.num_pending or 0
    console.print_result(
        {"model": model_of(consumer), "was_paused": bool(consumer.paused), "waiting": waiting, "server": link.server},
        f"{'resumed' if consumer.paused else 'was not paused:'} {model_of(consumer)}; {waiting} wait",
        as_json=as_json,
    )


async def _consumer(link: Connection, model: str) -> ConsumerInfo:
    found = await consumers(link)
    for consumer in found:
        if model in (consumer.name, model_of(consumer), *aliases_of(consumer)):
            return consumer
    known = ", ".join(map(model_of, found)) or "none"
    raise ModelNotFound(f"there is no model {model}; known are: {known}")
