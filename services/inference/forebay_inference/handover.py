"""Passes a request on to the worker that has the beginning of its conversation in its cache.

A worker subscribes to the key of each conversation that it has computed. So NATS knows who has one, and tells at once
if nobody has. The worker that pulled the next request of the conversation asks there. If the other has a free slot, it
gets the delivery, with the subject that acknowledges it. Otherwise the request runs where it was pulled. A worker that
dies in between leaves the message for a redelivery.
"""

import asyncio
import contextlib
import hashlib
import logging
from collections import OrderedDict, deque
from collections.abc import Mapping
from typing import Any, Final

import orjson
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError

from forebay_contracts.nats import permissions
from forebay_contracts.nats.connection import Connection
from forebay_contracts.queueing.deliveries import JetStreamDeliveries, JetStreamDelivery
from forebay_contracts.queueing.protocols import Delivery
from forebay_contracts.telemetry.logs import fields
from forebay_contracts.wire import names
from forebay_contracts.wire.request import InferenceRequest

LEAST_BYTES: Final = 2000
"""Of a request. Shorter ones are computed sooner than they are passed on."""

MAX_CONVERSATIONS: Final = 256
"""Of which a worker says that it has them; it forgets the ones of which it has heard longest ago."""

PATIENCE_S: Final = 0.02
"""Time for the other worker to answer."""

RESERVED_S: Final = 0.2
"""How long a slot waits for a delivery that was promised to it. A later one goes back to the queue."""

_ENDS: Final = 200
"""Characters at either end of a message that its key is made of, beside its length. All of 400 KB would take 0.6 ms."""

_GROUP: Final = "workers"

log = logging.getLogger(__name__)


class Handover:
    """The conversations of one worker, and those of others. All methods are for the event loop's thread."""

    def __init__(self, connection: Connection, deliveries: JetStreamDeliveries, model: str, worker: str) -> None:
        self._connection = connection
        self._deliveries = deliveries
        self._model = model
        self._worker = worker
        self._held: OrderedDict[str, Subscription] = OrderedDict()
        self._reserved: deque[asyncio.Future[Msg]] = deque()
        self._started = False

    async def start(self) -> None:
        """Take deliveries from other workers; nothing is passed on if NATS does not permit it."""
        own = await permissions.own(self._connection)
        subject = names.conversation_subject(self._model, "*")
        if own is None or not (own.publish.permit(subject) and own.subscribe.permit(subject)):
            log.info("[RequestQueue] conversations stay at no worker: the user of NATS may not use %s", subject)
            return
        await self._connection.client.subscribe(names.handover_subject(self._worker), cb=self._arrived)
        self._started = True

    async def taken(self, request: InferenceRequest, delivery: Delivery) -> bool:
        """Whether another worker runs this request. If not, this worker will have its conversation."""
        if not self._started or len(delivery.data) < LEAST_BYTES or (found := keys(request)) is None:
            return False
        before, whole = found
        with contextlib.suppress(NatsError, TimeoutError):  # nobody has it, or nobody answers
            if before and await self._passed_on(before, request.id, delivery):
                return True
        with contextlib.suppress(NatsError):
            await self._hold(whole)
        return False

    async def _passed_on(self, key: str, request_id: str, delivery: Delivery) -> bool:
        if key in self._held or names.HEADER_ACK in delivery.headers or not isinstance(delivery, JetStreamDelivery):
            return False
        if delivery.num_delivered > 1:  # the worker that has the conversation may be the one that failed
            return False
        asked = names.conversation_subject(self._model, key)
        worker = (await self._connection.requests.request(asked, timeout_s=PATIENCE_S)).data.decode()
        if not worker:
            return False
        headers = {**delivery.headers, names.HEADER_ACK: delivery.ack_subject}
        await self._connection.client.publish(names.handover_subject(worker), delivery.data, headers=headers)
        log.info("[RequestQueue] %s passed on to %s", request_id, worker, extra=fields(request_id=request_id))
        return True

    async def _hold(self, key: str) -> None:
        if key in self._held:
            self._held.move_to_end(key)
            return
        subject = names.conversation_subject(self._model, key)
        self._held[key] = await self._connection.client.subscribe(subject, queue=_GROUP, cb=self._asked)
        if len(self._held) > MAX_CONVERSATIONS:
            await self._held.popitem(last=False)[1].unsubscribe()

    async def _asked(self, msg: Msg) -> None:
        slot = self._deliveries.reserve()
        if slot is not None:
            self._reserved.append(slot)
            asyncio.get_running_loop().call_later(RESERVED_S, self._lapse, slot)
        await msg.respond(b"" if slot is None else self._worker.encode())

    def _lapse(self, slot: asyncio.Future[Msg]) -> None:
        if slot in self._reserved:
            self._reserved.remove(slot)
            self._deliveries.release(slot)

    async def _arrived(self, msg: Msg) -> None:
        headers = msg.headers or {}
        delivered = Msg(self._connection.client, msg.subject, headers[names.HEADER_ACK], msg.data, headers)
        while self._reserved:
            if not (slot := self._reserved.popleft()).done():
                slot.set_result(delivered)
                return
        await delivered.nak()


def keys(request: InferenceRequest) -> tuple[str, str] | None:
    """Keys of the conversation before its last answer (empty: there is none) and of all of it; None if it has none.

    The second is the first of the next request. Two conversations of one key are no harm: one is passed on in vain.
    """
    messages = request.messages
    answers = (place for place in range(len(messages) - 1, -1, -1) if messages[place].get("role") == "assistant")
    last = next(answers, None)
    before, digest = "", hashlib.blake2b(request.named_model.encode(), digest_size=16)
    try:
        for place, message in enumerate(messages):
            if place == last:
                before = digest.hexdigest()
            digest.update(_sample(message))
    except orjson.JSONEncodeError:  # an integer of more than 64 bits
        return None
    return (before, digest.hexdigest()) if messages else None


def _sample(message: Mapping[str, Any]) -> bytes:
    content = message.get("content")
    text = content if isinstance(content, str) else orjson.dumps(message).decode()
    return f"{message.get('role')} {len(text)} {text[:_ENDS]} {text[-_ENDS:]}".encode(errors="replace")
