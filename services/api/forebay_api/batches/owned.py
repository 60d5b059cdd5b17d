"""The record of a batch while a run owns it: each change is a compare-and-set, and another run may take it."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Final, Literal

from forebay_api.batches.output import Output
from forebay_api.in_flight.records import Kept
from forebay_api.openai.batches.record import FINAL, BatchRecord
from forebay_api.openai.batches.stored import Batches
from forebay_contracts.nats import clock
from forebay_contracts.queueing.protocols import Superseded
from forebay_contracts.wire.errors import QueueConflict, QueueUnavailable

SAVE_RETRY_S: Final = 0.25
"""Pause before a change is tried again while NATS is away."""

Stop = Literal["cancelled", "expired"]
"""Why a batch ends before all of its lines have run."""

log = logging.getLogger(__name__)


class OwnedRecord:
    """`record` as it was last seen. `name`: that of the run; no other run of the batch has it."""

    def __init__(self, batches: Batches, kept: Kept[BatchRecord], name: str) -> None:
        self._batches = batches
        self.record, self._revision = kept.record, kept.revision
        self._name = name
        self._saving = asyncio.Lock()

    @property
    def cancelled(self) -> bool:
        """Whether somebody wants the batch to be cancelled."""
        return self.record.status == "cancelling"

    @property
    def stop(self) -> Stop | None:
        """Why no further line is admitted, if that is so."""
        if self.cancelled:
            return "cancelled"
        return "expired" if clock.now() >= self.record.expires_at else None

    async def claim(self) -> bool:
        """Become the owner; returns whether an earlier run was. Raises Superseded if the batch has ended."""
        taken = False

        def claimed(record: BatchRecord) -> BatchRecord:
            nonlocal taken
            taken = record.run is not None
            return record.model_copy(update={"run": self._name})

        await self.save(claimed, claim=True)
        return taken

    async def read(self) -> None:
        """Take the record as it is now. Raises Superseded if another run owns it, and QueueUnavailable."""
        kept = await self._batches.get(self.record.id)
        if kept is None or kept.revision >= self._revision:  # else it was read before the last change
            self._take(kept)

    async def save(self, change: Callable[[BatchRecord], BatchRecord], *, claim: bool = False) -> None:
        """Change the record. `claim`: whoever owns it. Raises Superseded."""
        async with self._saving:
            while True:
                try:
                    changed = change(self.record)
                    self._revision = await self._batches.put(changed, self._revision)
                    self.record = changed
                    return
                except QueueConflict:
                    self._take(await self._batches.get(self.record.id), claim=claim)
                except QueueUnavailable as exc:
                    log.debug("[Batches] %s: %s", self.record.id, exc)
                    await asyncio.sleep(SAVE_RETRY_S)

    def _take(self, kept: Kept[BatchRecord] | None, *, claim: bool = False) -> None:
        if kept is None or (kept.record.run != self._name and not (claim and kept.record.status not in FINAL)):
            raise Superseded
        self.record, self._revision = kept.record, kept.revision


def counted(record: BatchRecord, output: Output, **changes: Any) -> BatchRecord:
    """The record with the counts of what is written."""
    counts = {"completed": output.completed, "failed": output.failed, "usage": output.usage}
    return record.model_copy(update={**counts, **changes})
