"""`forebay drain`: one worker told to exit."""

import json
from typing import Annotated

import typer
from nats.errors import NoRespondersError

from forebay_cli import console
from forebay_cli.declarations import AsJson, DataDir, NatsUrl, synchronous
from forebay_cli.nats_connection import connected, target
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import RequestError

TIMEOUT_S = 5.0


class WorkerNotFound(RequestError):
    """No worker answers to this id."""


@synchronous
async def drain(
    worker: Annotated[str, typer.Argument(metavar="WORKER_ID")],
    data_dir: DataDir = None,
    nats_url: NatsUrl = None,
    as_json: AsJson = False,
) -> None:
    """Let one worker finish its running requests and exit, as SIGTERM does."""
    unknown = WorkerNotFound(f"there is no worker {worker}: `forebay status` lists them")
    async with connected(target(data_dir, nats_url).named()) as link:
        # The id becomes part of a subject.
        if not names.is_request_id(worker):
            raise unknown
        try:
            answer = await link.client.request(names.drain_subject(worker), b"", timeout=TIMEOUT_S)
        except NoRespondersError as exc:
            raise unknown from exc
    running = json.loads(answer.data).get("running", 0)
    text = f"{worker} drains: it takes no new requests, finishes {running} and exits"
    console.print_result({"worker": worker, "running": running, "server": link.server}, text, as_json=as_json)
