"""The live reply channel: core NATS to the one api that holds the client."""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Final

from nats.errors import Error as NatsError
from nats.errors import NoRespondersError
from pydantic import ValidationError

from forebay_contracts.nats import clock
from forebay_contracts.nats.connection import Connection
from forebay_contracts.wire.frames import Resume
from forebay_contracts.wire.state import RequestStatus

CONFIRM_TIMEOUT_S: Final = 2.0
"""How long one try at a frame that the api must confirm may take."""

CONFIRM_RETRY_S: Final = 0.25
"""Pause between such tries."""

CONFIRM_GRACE_S: Final = 20.0
"""How long after the deadline an api is still asked how its request ended. It answers as soon as NATS is back."""

STALLED_S: Final = 30.0
"""How long an api with a subscription and no heartbeat is asked. If it goes on by then, its client gets the answer."""

log = logging.getLogger(__name__)


class LiveReplyChannel:
    """Frames to `reply_to`; see `ReplyChannel`. `ask` gives up CONFIRM_GRACE_S after `deadline` (time of the queue)."""

    lossless = False

    def __init__(self, connection: Connection, reply_to: str, deadline: float, api_alive: Callable[[], bool]) -> None:
        self._connection = connection
        self._reply_to = reply_to
        self._deadline = deadline
        self._api_alive = api_alive

    async def send(self, frame: bytes) -> None:
        """See `ReplyChannel.send`."""
        try:
            await self._connection.client.publish(self._reply_to, frame)
        except NatsError as exc:
            log.debug("%s: a frame was not sent: %r", self._reply_to, exc)

    async def flush(self) -> None:
        """Nothing waits here."""

    async def ask(self, frame: bytes) -> Resume:
        """See `ReplyChannel.ask`. An api without heartbeat is gone, with a subscription after STALLED_S."""
        asked_at = time.monotonic()
        while clock.now() < self._deadline + CONFIRM_GRACE_S:
            try:
                answer = await self._connection.requests.request(self._reply_to, frame, timeout_s=CONFIRM_TIMEOUT_S)
                return Resume.model_validate_json(answer.data)
            except (NatsError, TimeoutError) as exc:
                listens = not isinstance(exc, NoRespondersError)
                if not self._api_alive() and not (listens and time.monotonic() - asked_at < STALLED_S):
                    return Resume(wanted=False)
                log.debug("%s: the api did not confirm: %r", self._reply_to, exc)
            except ValidationError:
                log.warning("[RequestQueue] %s: the api's answer cannot be read", self._reply_to)
            await asyncio.sleep(CONFIRM_RETRY_S)
        return Resume(wanted=False, outcome=RequestStatus.TIMED_OUT)
