"""Takes batches from the stream `INFERENCE_BATCHES`: one message a batch, kept by an api as long as it runs the batch.

If an api dies, the server hands its batches to others after BATCH_ACK_WAIT_S.
"""

import asyncio
import contextlib
import logging
import uuid
from typing import Final

from nats.errors import Error as NatsError

from forebay_api.batches.run import Run
from forebay_api.context import Context
from forebay_api.openai.batches.record import FINAL
from forebay_contracts.nats.streams import BATCH_ACK_WAIT_S
from forebay_contracts.queueing.deliveries import JetStreamDeliveries
from forebay_contracts.queueing.protocols import Delivery, Superseded
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import ApiError

RUNNING: Final = 16
"""Most batches that one api process runs at once. The others wait."""

KEEP_S: Final = BATCH_ACK_WAIT_S / 4
"""Pause between two signs that a batch is still run here."""

AGAIN_S: Final = 2.0
"""Pause before a batch is handed out again that could not go on here."""

AGAIN_AFTER_FAULT_S: Final = 60.0
"""The same after an error that nobody expected."""

log = logging.getLogger(__name__)


class BatchQueue:
    """Runs batches at this api, from `start` to `close`."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._deliveries = JetStreamDeliveries(context.connection, names.BATCHES_CONSUMER, names.BATCHES)
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Take batches."""
        self._tasks = [asyncio.create_task(self._slot()) for _ in range(RUNNING)]

    async def close(self) -> None:
        """Give the batches back: another api goes on with them."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._deliveries.stop()

    async def _slot(self) -> None:
        while True:
            delivery = await self._deliveries.pull()
            keeping = asyncio.create_task(_keep(delivery))
            try:
                await self._handle(delivery)
            except (NatsError, TimeoutError) as exc:
                log.debug("[Batches] a delivery was not settled, so it comes again: %r", exc)
            finally:
                keeping.cancel()

    async def _handle(self, delivery: Delivery) -> None:
        batch_id = delivery.headers.get(names.HEADER_MSG_ID, "")
        try:
            kept = await self._context.batches.get(batch_id)
            if kept is not None and kept.record.status not in FINAL:
                await Run(self._context, kept, uuid.uuid4().hex).run()
            await delivery.ack()
        except asyncio.CancelledError:
            with contextlib.suppress(NatsError):
                await delivery.nak()
            raise
        except Superseded:
            log.info("[Batches] %s goes on at another api", batch_id)
        except ApiError as exc:
            log.info("[Batches] %s begins again where it is: %s", batch_id, exc)
            await delivery.nak(AGAIN_S)
        except Exception:
            log.exception("[Batches] %s failed unexpectedly", batch_id)
            await delivery.nak(AGAIN_AFTER_FAULT_S)


async def _keep(delivery: Delivery) -> None:
    while True:
        await asyncio.sleep(KEEP_S)
        with contextlib.suppress(NatsError):
            await delivery.in_progress()
