"""One thread that computes vectors, a forward pass at a time, each filled from all requests that wait."""

import asyncio
import contextlib
import logging
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence

from forebay_inference.engine.protocol import EngineFault, EngineStatus

MAX_FAILURES_IN_A_ROW = 3
"""After so many failed forward passes without one that succeeded, the engine counts as broken."""

STOP_TIMEOUT_S = 30.0

_log = logging.getLogger(__name__)

Vectors = list[tuple[int, bytes]]


class Job:
    """One request's inputs, by index, and their vectors as they come."""

    def __init__(self, inputs: Mapping[int, Sequence[int]]) -> None:
        # By length, so that the rows of a pass need little padding.
        self.waiting = deque(sorted(inputs.items(), key=lambda item: len(item[1]), reverse=True))
        self.unfinished = len(inputs)
        self._results: asyncio.Queue[Vectors | str] = asyncio.Queue()

    def deliver(self, result: Vectors | str) -> None:
        """The vectors of a pass, or why there are none; on the event loop."""
        self._results.put_nowait(result)

    async def next_vectors(self) -> Vectors:
        """What the next pass has brought; raises EngineFault."""
        result = await self._results.get()
        if isinstance(result, str):
            raise EngineFault(result)
        self.unfinished -= len(result)
        return result


class EmbeddingBatch:
    """Fills passes of at most `max_tokens` tokens, padding included, from the requests in turn.

    In turn, so that a request of one input does not wait for all 2048 of another. An input longer than
    `max_tokens` has a pass of its own.
    """

    def __init__(
        self, embed: Callable[[list[Sequence[int]]], list[bytes]], max_tokens: int, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._embed = embed
        self._max_tokens = max_tokens
        self._loop = loop
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._stopped = False
        self._passes = 0
        self._rows = 0
        self._failures = 0
        self._fault: str | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name="embedding")

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Put a job in line; raises EngineFault where nothing is computed any more."""
        with self._changed:
            if self._fault is not None or self._stopped:
                raise EngineFault(f"the engine serves nothing: {self._fault or 'it was closed'}")
            if job.waiting:
                self._jobs.append(job)
                self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Take a job out; what of it is in the pass that runs is computed and dropped."""
        with self._changed, contextlib.suppress(ValueError):
            self._jobs.remove(job)

    def status(self) -> EngineStatus:
        """How it is now; callable from any thread."""
        return EngineStatus(self._fault, self._rows, self._passes)

    def stop(self) -> None:
        """End the thread, failing what waits; blocks until the pass that runs is over."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(STOP_TIMEOUT_S)

    def _run(self) -> None:
        while rows := self._next_rows():
            self._rows = len(rows)
            try:
                vectors = self._embed([tokens for _, _, tokens in rows])
            except Exception:
                _log.exception("a forward pass over %d inputs failed", len(rows))
                self._failed({job for job, _, _ in rows})
                continue
            self._passes += 1
            self._failures = 0
            results: defaultdict[Job, Vectors] = defaultdict(list)
            for (job, index, _), values in zip(rows, vectors, strict=True):
                results[job].append((index, values))
            for job, found in results.items():
                self._deliver(job, found)
        for job in self._jobs:
            self._deliver(job, "the engine was closed")

    def _next_rows(self) -> list[tuple[Job, int, Sequence[int]]]:
        """What fits into the next pass, waiting until there is something; empty when it is time to end."""
        with self._changed:
            if not self._jobs:
                self._rows = 0
            self._changed.wait_for(lambda: self._jobs or self._stopped)
            rows: list[tuple[Job, int, Sequence[int]]] = []
            longest = 0
            while self._jobs and not self._stopped:
                job = self._jobs[0]
                index, tokens = job.waiting[0]
                longest = max(longest, len(tokens))
                if rows and (len(rows) + 1) * longest > self._max_tokens:
                    break
                job.waiting.popleft()
                self._jobs.popleft()
                if job.waiting:
                    self._jobs.append(job)
                rows.append((job, index, tokens))
            return rows

    def _failed(self, jobs: Iterable[Job]) -> None:
        self._failures += 1
        with self._changed:
            broken = self._failures >= MAX_FAILURES_IN_A_ROW
            if broken:
                self._fault, self._stopped = f"{self._failures} forward passes in a row failed", True
            for job in jobs:
                with contextlib.suppress(ValueError):
                    self._jobs.remove(job)
                self._deliver(job, "a forward pass failed")

    def _deliver(self, job: Job, result: Vectors | str) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody waits
            self._loop.call_soon_threadsafe(job.deliver, result)
