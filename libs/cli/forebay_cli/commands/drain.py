"""`forebay drain`: one worker told to exit."""

from typing import Annotated

import typer

from forebay_cli import console
from forebay_cli.declarations import AsJson, DataDir, NatsUrl, synchronous
from forebay_cli.nats_connection import connected, target
from forebay_contracts.queueing import steering
from forebay_contracts.wire.errors import WorkerNotFound


@synchronous
async def drain(
    worker: Annotated[str, typer.Argument(metavar="WORKER_ID")],
    data_dir: DataDir = None,
    nats_url: NatsUrl = None,
    as_json: AsJson = False,
) -> None:
    """Let one worker finish its running requests and exit, as SIGTERM does."""
    async with connected(target(data_dir, nats_url).named()) as link:
        try:
            running = await steering.drain(link, worker)
        except WorkerNotFound as exc:
            raise WorkerNotFound(f"{exc}: `forebay status` lists them") from exc
    text = f"{worker} drains: it takes no new requests, finishes {running} and exits"
    console.print_result({"worker": worker, "running": running, "server": link.server}, text, as_json=as_json)
