"""`forebay cancel`: one request cancelled by an operator."""

from typing import Annotated

import typer

from forebay_cli import console
from forebay_cli.commands.requests import find
from forebay_cli.declarations import AsJson, DataDir, NatsUrl, synchronous
from forebay_cli.nats_connection import connected, target
from forebay_contracts.queueing.admission import JetStreamAdmission
from forebay_contracts.queueing.answer_log import JetStreamAnswerLog
from forebay_contracts.queueing.cancellation import Cancellation, NatsCancelNotices
from forebay_contracts.queueing.state_store import KeyValueStateStore
from forebay_contracts.wire.errors import QueueConflict


@synchronous
async def cancel(
    request_id: Annotated[str, typer.Argument(metavar="ID")],
    data_dir: DataDir = None,
    nats_url: NatsUrl = None,
    as_json: AsJson = False,
) -> None:
    """Cancel a request that waits or runs. Exit code 1: it has ended already."""
    async with connected(target(data_dir, nats_url).named()) as link:
        known = await find(link, request_id)
        request_id = known.id
        states = KeyValueStateStore(link)
        cancellation = Cancellation(states, JetStreamAdmission(link), NatsCancelNotices(link), JetStreamAnswerLog(link))
        done = await cancellation.cancel(request_id, "cancelled by the operator")
        latest = await states.get(request_id)
    ended = (latest.state if latest else known).status
    if as_json:
        console.print_json({"id": request_id, "cancelled": done, "status": ended, "server": link.server})
    if not done:
        raise QueueConflict(f"request {request_id} has ended already: {ended.value}")
    if not as_json:
        console.stdout.print(f"cancelled {request_id}", markup=False)
