"""An answer that several clients read, each from its beginning, while it is still generated."""

import asyncio
from collections.abc import AsyncIterator

from forebay_contracts.wire.errors import ApiError
from forebay_contracts.wire.frames import Completed, Delta


class Recording:
    """The deltas of an answer so far, and its end."""

    def __init__(self) -> None:
        self.deltas: list[Delta] = []
        self.begun = False
        self.completed: Completed | None = None
        self.error: ApiError | None = None
        self._readers: list[RecordedAnswer] = []

    def answer(self) -> "RecordedAnswer":
        """The answer for one more client."""
        answer = RecordedAnswer(self)
        self._readers.append(answer)
        return answer

    def begin(self) -> None:
        """A worker has started."""
        self.begun = True
        self._tell()

    def add(self, deltas: list[Delta]) -> None:
        """More of the answer."""
        self.deltas += deltas
        self._tell()

    def finish(self, completed: Completed) -> None:
        """All of it is there."""
        self.completed = completed
        self._tell()

    def fail(self, error: ApiError) -> None:
        """It ends in an error, unless it has ended."""
        if self.completed is None and self.error is None:
            self.error = error
            self._tell()

    def _tell(self) -> None:
        for reader in self._readers:
            reader.changed.set()


class RecordedAnswer:
    """What one client reads of a recording; it can give up without disturbing the others."""

    attempt = 0

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._own_error: ApiError | None = None
        self.changed = asyncio.Event()

    @property
    def completed(self) -> Completed | None:
        """The end, once it is there."""
        return self._recording.completed

    def fail(self, error: ApiError) -> None:
        """This reader stops waiting."""
        self._own_error = error
        self.changed.set()

    async def started(self) -> None:
        """Wait until a worker has begun; raises how it ended if it ended before that."""
        while not self._recording.begun and self.completed is None:
            await self._wait()

    async def deltas(self) -> AsyncIterator[list[Delta]]:
        """All deltas from the first, as many at a time as have come."""
        read = 0
        while True:
            if len(self._recording.deltas) > read:
                new = self._recording.deltas[read:]
                read += len(new)
                yield new
            elif self.completed is not None:
                return
            else:
                await self._wait()

    async def _wait(self) -> None:
        if (error := self._own_error or self._recording.error) is not None:
            raise error
        self.changed.clear()
        await self.changed.wait()
        if (error := self._own_error) is not None:
            raise error
