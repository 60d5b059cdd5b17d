"""`forebay pause` and `forebay resume`: JetStream's pause of a model's consumer."""

from datetime import UTC, datetime
from typing import Annotated

import typer

from forebay_cli import console
from forebay_cli.declarations import AsJson, DataDir, NatsUrl, duration_s, synchronous
from forebay_cli.nats_connection import connected, target
from forebay_contracts.queueing import steering
from forebay_contracts.queueing.steering import MAX_PAUSE_S
from forebay_contracts.wire.errors import ConfigurationError

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
        done = await steering.pause(link, model, for_s)
    assert done.paused_until is not None
    until = datetime.fromtimestamp(done.paused_until, UTC).astimezone()
    end = f"until {until:%F %T}" if for_s else "until it is resumed"
    console.print_result(
        {"model": done.model, "paused_until": done.paused_until, "running": done.running, "server": link.server},
        f"paused {done.model} {end}; {done.running} still run",
        as_json=as_json,
    )


@synchronous
async def resume(model: Model, data_dir: DataDir = None, nats_url: NatsUrl = None, as_json: AsJson = False) -> None:
    """Hand out requests of a paused model again."""
    async with connected(target(data_dir, nats_url).named()) as link:
        done = await steering.resume(link, model)
    console.print_result(
        {"model": done.model, "was_paused": done.was_paused, "waiting": done.waiting, "server": link.server},
        f"{'resumed' if done.was_paused else 'was not paused:'} {done.model}; {done.waiting} wait",
        as_json=as_json,
    )
