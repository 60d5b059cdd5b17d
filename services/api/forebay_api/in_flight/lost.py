"""What NATS has lost of an unfinished request is published again."""

import logging

from forebay_contracts.queueing.protocols import Admission
from forebay_contracts.wire.request import InferenceRequest
from forebay_contracts.wire.state import RequestState, RequestStatus

log = logging.getLogger(__name__)


async def is_lost(admission: Admission, request: InferenceRequest, sequence: int, state: RequestState | None) -> bool:
    """Whether no message of the request is stored, which was admitted at `sequence`. Raises QueueUnavailable."""
    if not request.deferred or _has_not_begun(state):
        return not await admission.holds(request.id, sequence, deferred=request.deferred)
    # It was moved, or has given way. A worker that died meanwhile has not noted where the message is.
    if state is None or (place := state.sequence or state.deferred) is None:
        return True
    return not await admission.holds(request.id, place, deferred=state.sequence is None)


async def publish_again(admission: Admission, request: InferenceRequest, state: RequestState | None) -> int:
    """Publish it again; returns its new sequence. Raises as `Admission.publish`.

    One that was moved goes back with a turn that is not void. NATS and the apis leave out what is there after all.
    """
    log.warning("[RequestQueue] %s: NATS lost it, so it is published again", request.id)
    if state is None or not request.deferred or _has_not_begun(state):
        return await admission.publish(request)
    return await admission.put_back(request, state.turn + int(state.status is RequestStatus.PROCESSING), {})


def _has_not_begun(state: RequestState | None) -> bool:
    return state is None or (state.status is RequestStatus.QUEUED and state.turn == 0)
