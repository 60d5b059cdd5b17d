"""The two files that a batch writes, while it runs: what completed, and what did not.

They are the batch's memory. A part of a file is one append of chunks, and its last chunk names the lines in it. So
whoever goes on reads there what is done, and the server lets only one of two writers add the next part.
"""

import asyncio
import contextlib
import hashlib
import logging
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import orjson
from prometheus_client import Counter

from forebay_api import request_metrics
from forebay_api.in_flight.files import BATCH_CHUNKS, CHUNK_BYTES, File, FileMetadata, Files, digest_of, sequence_of
from forebay_api.openai.batches.record import BatchRecord, BatchUsage
from forebay_api.openai.files.upload import PREFIX
from forebay_contracts.nats import clock
from forebay_contracts.telemetry.metrics import bound
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import FileStoreFull, QueueConflict, QueueUnavailable
from forebay_contracts.wire.state import Usage

GATHER_S: Final = 0.1
"""How long a line waits for others before it is written."""

RETRY_S: Final = 1.0
"""Pause while the store is full or away."""

MAX_WAITING_BYTES: Final = 4 * 1024 * 1024
"""Bytes of lines that wait to be written, beyond which nobody reads further answers."""

MAX_PART_LINES: Final = 500
"""Most lines of a part. Their numbers stand in a header."""

Kind = Literal["output", "error"]

_COMPLETED, _FAILED = (bound(request_metrics.BATCH_LINES, result) for result in ("completed", "failed"))

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Half:
    """One of the two files. `last`: the sequence of its last chunk; `lines`: how many are in it."""

    nuid: str
    written: Counter
    last: int = 0
    lines: int = 0
    waiting: list[tuple[int, bytes, Usage | None]] = field(default_factory=list)
    size: int = 0
    flushing: asyncio.Task[None] | None = None
    writing: asyncio.Lock = field(default_factory=asyncio.Lock)


class Output:
    """The files of one batch. Each method that writes raises QueueConflict if another api writes them too."""

    def __init__(self, files: Files, record: BatchRecord) -> None:
        self._files = files
        self._record = record
        digits = record.id.removeprefix("batch_")
        self._halves: dict[Kind, _Half] = {
            "output": _Half(f"{BATCH_CHUNKS}-{digits}-output", _COMPLETED),
            "error": _Half(f"{BATCH_CHUNKS}-{digits}-error", _FAILED),
        }
        self._done = bytearray()
        self.usage = BatchUsage()

    @property
    def completed(self) -> int:
        """The number of lines in the output file."""
        return self._halves["output"].lines

    @property
    def failed(self) -> int:
        """The number of lines in the error file."""
        return self._halves["error"].lines

    def has(self, number: int) -> bool:
        """Whether a line is in one of the files."""
        return number < len(self._done) and bool(self._done[number])

    async def take_over(self) -> None:
        """Read what is done, and add an empty part to both files: from then on no earlier writer can add anything.

        A part that was not written to its end is removed.
        """
        for half in self._halves.values():
            while True:
                await self._load(half)
                with contextlib.suppress(QueueConflict):
                    await self._write(half, [])
                    break

    async def _load(self, half: _Half) -> None:
        unfinished: list[int] = []
        async for page in self._files.read(half.nuid, half.last):
            for msg in page:
                unfinished.append(sequence_of(msg))
                if (lines := (msg.headers or {}).get(names.HEADER_LINES)) is not None:
                    half.last = unfinished[-1]
                    unfinished.clear()
                    self._count(half, orjson.loads(lines))
        for sequence in unfinished:
            await self._files.remove(sequence)

    def put(self, kind: Kind, number: int, line: bytes, usage: Usage | None = None) -> bool:
        """Have a line written with the next flush; returns whether it is time for one."""
        half = self._halves[kind]
        half.waiting.append((number, line, usage))
        half.size += len(line)
        return half.size >= CHUNK_BYTES or len(half.waiting) >= MAX_PART_LINES

    async def add(self, kind: Kind, number: int, line: bytes, usage: Usage | None = None) -> None:
        """Write a line, together with others; once this returns, it is safe."""
        self.put(kind, number, line, usage)
        half = self._halves[kind]
        if half.flushing is None:
            half.flushing = asyncio.create_task(self._flush_soon(half))
        await asyncio.shield(half.flushing)

    async def room(self) -> None:
        """Wait while much has to be written."""
        for half in self._halves.values():
            if half.size > MAX_WAITING_BYTES:
                await self._flush(half)

    async def flush(self) -> None:
        """Write what waits."""
        for half in self._halves.values():
            await self._flush(half)

    async def discard(self) -> None:
        """Remove what was written."""
        for half in self._halves.values():
            half.waiting.clear()
            half.lines = half.last = 0
            await self._files.purge(half.nuid)

    async def close(self) -> None:
        """Write nothing more."""
        tasks = [half.flushing for half in self._halves.values() if half.flushing is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def finish(self) -> dict[Kind, str]:
        """Make files of all parts; returns their ids. A file without a line is not kept."""
        made: dict[Kind, str] = {}
        for kind, half in self._halves.items():
            if half.lines:
                made[kind] = PREFIX + self._record.named(kind).hex
                await self._files.put(await self._file(made[kind], kind, half), self._record.kept_s)
            else:
                await self._files.purge(half.nuid)
        return made

    async def _flush_soon(self, half: _Half) -> None:
        await asyncio.sleep(GATHER_S)
        half.flushing = None  # a line from here on waits for the next flush
        await self._flush(half)

    async def _flush(self, half: _Half) -> None:
        async with half.writing:
            while half.waiting:
                part = half.waiting[:MAX_PART_LINES]
                del half.waiting[:MAX_PART_LINES]
                half.size = sum(len(line) for _, line, _ in half.waiting)
                await self._write(half, part)

    async def _write(self, half: _Half, part: list[tuple[int, bytes, Usage | None]]) -> None:
        data = b"".join(line for _, line, _ in part)
        used = [usage for _, _, usage in part if usage is not None]
        known = {
            "lines": [number for number, _, _ in part],
            "usage": {name: sum(getattr(usage, name) for usage in used) for name in BatchUsage.model_fields},
        }
        header = orjson.dumps(known).decode()
        for start in range(0, max(len(data), 1), CHUNK_BYTES):
            end = start + CHUNK_BYTES
            half.last = await self._append(half, data[start:end], header if end >= len(data) else None)
        self._count(half, known)
        half.written.inc(len(part))

    async def _append(self, half: _Half, chunk: bytes, lines: str | None) -> int:
        ttl_s = max(self._record.expires_at - clock.now(), 0) + self._record.kept_s
        while True:
            try:
                return await self._files.append(half.nuid, chunk, half.last, ttl_s, lines)
            except (FileStoreFull, QueueUnavailable) as exc:
                log.warning("[Batches] %s: %s", self._record.id, exc)
                await asyncio.sleep(RETRY_S)

    def _count(self, half: _Half, known: dict[str, Any]) -> None:
        lines: list[int] = known["lines"]
        self._done.extend(bytes(max(max(lines, default=0) + 1 - len(self._done), 0)))
        for number in lines:
            self._done[number] = 1
        half.lines += len(lines)
        sums = {name: getattr(self.usage, name) + known["usage"][name] for name in BatchUsage.model_fields}
        self.usage = BatchUsage(**sums)

    async def _file(self, name: str, kind: Kind, half: _Half) -> File:
        digest, size, chunks = hashlib.sha256(), 0, 0
        async for page in self._files.read(half.nuid):
            for msg in page:
                digest.update(msg.data)
                size, chunks = size + len(msg.data), chunks + 1
        now, record = clock.now(), self._record
        return File(
            name=name,
            nuid=half.nuid,
            size=size,
            chunks=chunks,
            digest=digest_of(digest.digest()),
            metadata=FileMetadata(
                filename=f"{record.id}_{kind}.jsonl",
                purpose="batch_output",
                created_at=str(int(now)),
                expires_at=str(int(now + record.kept_s)),
                key=record.key,
            ),
        )
