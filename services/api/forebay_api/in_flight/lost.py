"""What NATS has lost of an unfinished request is published again."""

import logging

from forebay_contracts.queueing.protocols import Admission
from forebay_contracts.wire.request import InferenceRequest, Tier
from forebay_contracts.wire.state import RequestState, RequestStatus

log = logging.getLogger(__name__)


async def is_lost(admission: Admission, request: InferenceRequest, sequence: int, state: RequestState | None) -> bool:
    """Whether no message of the request is stored, which was admitted at `sequence`. Raises QueueUnavailable."""
    deferred = request.tier is Tier.FLEX
    if not deferred or state is None or (state.turn == 0 and state.status is RequestStatus.QUEUED):
        return not await admission.holds(request.id, sequence, deferred=deferred)
    # It was moved, or has given way. Of the latter, nobody knows where the message is.
    return state.sequence is None or not await admission.holds(request.id, state.sequence)


async def publish_again(admission: Admission, request: InferenceRequest, state: RequestState | None) -> int:
    """Publish it again; returns its new sequence. Raises as `Admission.publish`.

    One that was moved goes back with a turn that is not void. NATS and the apis leave out what is there after all.
    """
    log.warning("[RequestQueue] %s: NATS lost it, so it is published again", request.id)
    if request.tier is not Tier.FLEX or state is None or (state.turn == 0 and state.status is RequestStatus.QUEUED):
        return await admission.publish(request)
    return await admission.put_back(request, state.turn + int(state.status is RequestStatus.PROCESSING), {})
