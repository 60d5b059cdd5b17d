"""An answer that several clients read, each from its beginning, while it is still generated."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator

from forebay_contracts.wire.errors import ApiError
from forebay_contracts.wire.frames import Completed, Delta


class Recording:
    """The deltas of an answer so far, and its end."""

    def __init__(self) -> None:
        self.deltas: list[Delta] = []
        self.begun = False
        self.completed: Completed | None = None
        self.error: ApiError | None = None
        self._readers: set[RecordedAnswer] = set()

    @contextlib.contextmanager
    def read(self) -> Iterator["RecordedAnswer"]:
        """The answer for one more client."""
        answer = RecordedAnswer(self)
        self._readers.add(answer)
        try:
            yield answer
        finally:
            self._readers.discard(answer)

    def begin(self) -> None:
        """A worker has begun."""
        self.begun = True
        self._wake()

    def add(self, deltas: list[Delta]) -> None:
        """More deltas have come."""
        self.deltas += deltas
        self._wake()

    def finish(self, completed: Completed) -> None:
        """The answer is whole."""
        self.completed = completed
        self._wake()

    def fail(self, error: ApiError) -> None:
        """The request fails with `error`, unless it has ended."""
        if self.completed is None and self.error is None:
            self.error = error
            self._wake()

    def _wake(self) -> None:
        for reader in self._readers:
            reader.changed.set()


class RecordedAnswer:
    """One client's view of a recording. It can stop waiting without an effect on other clients. See `Answer`."""

    attempt = 0

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._own_error: ApiError | None = None
        self.changed = asyncio.Event()

    @property
    def completed(self) -> Completed | None:
        """See `Answer.completed`."""
        return self._recording.completed

    def fail(self, error: ApiError) -> None:
        """See `Answer.fail`."""
        self._own_error = error
        self.changed.set()

    async def started(self) -> None:
        """See `Answer.started`."""
        while not self._recording.begun and self.completed is None:
            await self._wait()

    async def deltas(self) -> AsyncIterator[list[Delta]]:
        """See `Answer.deltas`."""
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
        if self._own_error is not None:
            raise self._own_error
