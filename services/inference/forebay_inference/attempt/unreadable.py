"""The end of a message that this version cannot read."""

import contextlib
import logging
from collections.abc import Callable

from pydantic import ValidationError

from forebay_contracts.queueing.protocols import Delivery, ReplyChannel, StateStore
from forebay_contracts.queueing.state_store import end
from forebay_contracts.telemetry.logs import fields
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import InferenceFailed, StateUnreadable
from forebay_contracts.wire.frames import failed
from forebay_contracts.wire.state import RequestStatus
from forebay_inference.attempt.endings import End, Ended, Told, settle
from forebay_inference.attempt.ownership import patiently

log = logging.getLogger(__name__)


async def end_unreadable(
    states: StateStore,
    channel: Callable[[str, float], ReplyChannel],
    request_id: str,
    delivery: Delivery,
    error: ValidationError,
) -> None:
    """Remove a message that this worker cannot read, count it once, and tell the api that its headers name.

    It may come from an api with a newer schema. Another worker might be able to read it, but there may be none.
    """
    known = names.is_request_id(request_id)
    log.error(
        "[RequestQueue] message %d cannot be read and was removed: %d faults, the first in %s: %s%s",
        delivery.sequence,
        error.error_count(),
        ".".join(str(part) for part in error.errors()[0]["loc"]) or "the JSON itself",
        error.errors()[0]["type"],
        f" (request {request_id})" if known else "",
        extra=fields(request_id=request_id),
    )

    async def tell(_: Told, ended: Ended) -> RequestStatus | None:
        reply_to = delivery.headers.get(names.HEADER_REPLY_TO, "")
        if ended.error is None:
            return None
        frame = failed(delivery.num_delivered, ended.error).encode()
        if known and reply_to == names.answer_subject(request_id):  # its readers wait for the end in the log
            return (await channel(reply_to, 0).ask(frame)).outcome
        if names.is_reply_subject(reply_to):
            await channel(reply_to, 0).send(frame)
        return None

    async def record(status: RequestStatus, ended: Ended) -> None:
        with contextlib.suppress(StateUnreadable):
            if known and await patiently(lambda: states.get(request_id)) is not None:
                message = ended.error.message if ended.error is not None else None
                await patiently(lambda: end(states, request_id, status, message))
                return
        await patiently(lambda: states.count(status, f"unreadable-{delivery.sequence}"))

    reason = InferenceFailed("a worker could not read the request: it may be older than the api")
    await settle(Ended(End.UNREADABLE, error=reason), lambda: delivery, tell, record)
