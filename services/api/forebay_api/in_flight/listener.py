"""What an api receives from NATS: the frames of its requests, cancel notices, and what is said of idle slots."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Final

from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from pydantic import ValidationError

from forebay_api.in_flight.dispatcher import Dispatcher
from forebay_api.in_flight.mover import Mover
from forebay_api.in_flight.stored import StoredRequests
from forebay_contracts.nats.connection import Connection
from forebay_contracts.nats.streams import HEARTBEAT_TTL_S
from forebay_contracts.telemetry.logs import fields
from forebay_contracts.wire import names
from forebay_contracts.wire.frames import Frame, Started, decode_frame
from forebay_contracts.wire.heartbeats import Used

REPLY_PENDING_MESSAGES: Final = 1_000_000
REPLY_PENDING_BYTES: Final = 512 * 1024 * 1024
"""How much may wait between the socket and `Listener`. More is dropped, and is then a gap to be sent again."""

MOVERS: Final = "movers"
"""Queue group: one api looks for work for an idle slot."""

log = logging.getLogger(__name__)


class Listener:
    """Receives the frames of all requests of this api by one subscription."""

    def __init__(self, connection: Connection, dispatcher: Dispatcher, stored: StoredRequests, mover: Mover) -> None:
        self._stored = stored
        self._mover = mover
        self._connection = connection
        self._dispatcher = dispatcher

    async def start(self) -> None:
        """Listen for frames, cancel notices and idle slots."""
        client = self._connection.client
        await client.subscribe(
            names.reply_subjects(self._dispatcher.instance),
            cb=self._replied,
            pending_msgs_limit=REPLY_PENDING_MESSAGES,
            pending_bytes_limit=REPLY_PENDING_BYTES,
        )
        await client.subscribe(names.cancel_subject("*"), cb=self._cancelled)
        await client.subscribe(names.idle_subject("*"), cb=self._idle)
        await client.subscribe(names.idle_subject("*"), queue=MOVERS, cb=self._moves(self._mover.look))
        await client.subscribe(names.waiting_subject("*"), cb=self._moves(self._mover.deferred))
        await client.subscribe(names.waiting_subject("*"), queue=MOVERS, cb=self._moves(self._mover.look_unless_busy))
        self._connection.on_reconnect.append(self._reconnected)

    async def _replied(self, msg: Msg) -> None:
        request_id = msg.subject.rsplit(".", 1)[1]
        try:
            frame = decode_frame(msg.data)
        except ValidationError as exc:
            if not msg.data:
                return  # to find out whether this api is connected; see `names.connected_subject`
            log.warning(
                "[RequestQueue] %s: a reply that cannot be read was dropped (%d faults)",
                request_id,
                len(exc.errors()),
                extra=fields(request_id=request_id),
            )
            return
        answer = self._dispatcher.waiting.get(request_id)
        with contextlib.suppress(NatsError):
            if answer is None:
                await self._turn_away(request_id, frame, msg)
                return
            answer.receive(frame)
            if msg.reply:
                await msg.respond(answer.have(frame).encode())
            elif (have := answer.missing(time.monotonic())) is not None:
                log.warning(
                    "[RequestQueue] %s: frames were lost, asking for them again",
                    request_id,
                    extra=fields(request_id=request_id, attempt=answer.attempt),
                )
                await self._connection.client.publish(names.resend_subject(request_id), have.encode())

    async def _turn_away(self, request_id: str, frame: Frame, msg: Msg) -> None:
        """Tell a worker that nobody waits for its request."""
        ended = self._dispatcher.ended(request_id).encode()
        if msg.reply:
            await msg.respond(ended)
        elif isinstance(frame, Started):
            await self._connection.client.publish(names.resend_subject(request_id), ended)

    async def _cancelled(self, msg: Msg) -> None:
        self._dispatcher.cancelled(msg.subject.rsplit(".", 1)[1], msg.data.decode(errors="replace")[:200])

    async def _idle(self, msg: Msg) -> None:
        try:
            used = Used.model_validate_json(msg.data) if msg.data else None
        except ValidationError:
            log.warning("[RequestQueue] what an attempt has used cannot be read")
            used = None
        self._mover.idle(_last_token(msg), used)

    @staticmethod
    def _moves(act: Callable[[str], None]) -> Callable[[Msg], Awaitable[None]]:
        async def told(msg: Msg) -> None:
            act(_last_token(msg))

        return told

    async def _reconnected(self) -> None:
        # By then every worker knows this api again. Workers may have cancelled its requests as those of a dead api.
        asyncio.get_running_loop().call_later(HEARTBEAT_TTL_S, self._look)

    def _look(self) -> None:
        self._dispatcher.look_after_an_outage()
        self._stored.look_after_an_outage()
        self._mover.look_at_all()


def _last_token(msg: Msg) -> str:
    token: str = msg.subject.rsplit(".", 1)[1]
    return token
