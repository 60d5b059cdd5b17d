"""The requests whose state changed last, read from the bucket at once."""

import contextlib

from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.js.errors import NotFoundError
from pydantic import ValidationError

from forebay_contracts.nats import direct_get
from forebay_contracts.nats.connection import Connection
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import QueueUnavailable
from forebay_contracts.wire.state import RequestState


async def recent_states(connection: Connection, changes: int) -> list[RequestState]:
    """The states among the latest `changes` of the bucket, one for each request, the newest last.

    Raises:
        QueueUnavailable: NATS does not answer, or no service has been started yet.
    """
    found = []
    messages, _ = await recent_changes(connection, changes)
    for msg in messages:
        with contextlib.suppress(ValidationError):
            found.append(RequestState.model_validate_json(msg.data))
    return found


async def recent_changes(connection: Connection, changes: int, after: int = 0) -> tuple[list[Msg], bool]:
    """The same as stored messages, undecoded, each with its `Nats-Subject` and `Nats-Sequence`; and whether the bucket
    has older ones.

    With `after`, only those with a later revision. All of them if the bucket has no such revision yet: it is a new one.

    Raises:
        QueueUnavailable: NATS does not answer, or no service has been started yet.
    """
    stream = names.bucket_stream(names.REQUESTS_BUCKET)
    try:
        info = await connection.jetstream.stream_info(stream)
        first = max(info.state.first_seq, info.state.last_seq - changes + 1, 1)
        if after <= info.state.last_seq:
            first = max(first, after + 1)
        if info.state.messages == 0:
            return [], False
        found = await direct_get.messages(connection, stream, names.bucket_subjects(names.REQUESTS_BUCKET), first)
        return found, first > info.state.first_seq
    except NotFoundError as exc:
        raise QueueUnavailable("NATS holds no requests yet: no service has been started") from exc
    except (NatsError, TimeoutError) as exc:
        raise QueueUnavailable("NATS did not answer") from exc
