"""Files and batches in one process, on the twins of the queue."""

import asyncio
import contextlib
import hashlib
import itertools
import json
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

from nats.aio.msg import Msg

from forebay_api.batches.run import Run
from forebay_api.in_flight.carried import CarriedRequests
from forebay_api.in_flight.files import PAGE, File, FileMetadata, digest_of
from forebay_api.in_flight.records import Kept
from forebay_api.in_flight.stored import StoredRequests
from forebay_api.openai.batches.record import FINAL, BatchRecord
from forebay_api.watching.served_models import Asked
from forebay_contracts.settings import ApiSettings, load
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import FileStoreFull, ModelNotFound, QueueConflict
from support.twins import MODEL, Twins

URL = "/v1/chat/completions"


class InMemoryFiles:
    """As `Files`. `full` refuses chunks."""

    def __init__(self) -> None:
        self.chunks: dict[str, list[Msg]] = {}
        self.files: dict[str, File] = {}
        self.full = False
        self._sequences = itertools.count(1)

    async def append(self, nuid: str, data: bytes, last: int, _ttl_s: float, lines: str | None = None) -> int:
        chunks = self.chunks.setdefault(nuid, [])
        if self.full:
            raise FileStoreFull("full")
        if (int((chunks[-1].headers or {})["Nats-Sequence"]) if chunks else 0) != last:
            raise QueueConflict("another write came first")
        headers = {"Nats-Sequence": str(next(self._sequences))}
        if lines is not None:
            headers[names.HEADER_LINES] = lines
        chunks.append(Msg(None, data=data, headers=headers))  # type: ignore[arg-type]
        return int(headers["Nats-Sequence"])

    async def read(self, nuid: str, after: int = 0) -> AsyncIterator[list[Msg]]:
        found = [msg for msg in self.chunks.get(nuid, ()) if int((msg.headers or {})["Nats-Sequence"]) > after]
        for start in range(0, len(found), PAGE):
            yield found[start : start + PAGE]

    async def content(self, file: File) -> AsyncIterator[bytes]:
        async for page in self.read(file.nuid):
            for msg in page:
                yield msg.data

    async def get(self, name: str) -> File | None:
        return self.files.get(name)

    async def put(self, file: File, _ttl_s: float) -> None:
        self.files.setdefault(file.name, file)

    async def remove(self, sequence: int) -> None:
        for nuid, chunks in self.chunks.items():
            self.chunks[nuid] = [msg for msg in chunks if (msg.headers or {})["Nats-Sequence"] != str(sequence)]

    async def purge(self, nuid: str) -> None:
        self.chunks.pop(nuid, None)

    def upload(self, data: bytes, piece: int = 1_000) -> str:
        """Make a file of `data`, in chunks of `piece` bytes; returns its id."""
        name = f"file-{len(self.files):032x}"
        metadata = FileMetadata(filename="in.jsonl", purpose="batch", created_at="0", expires_at="9999999999")
        headers = [{"Nats-Sequence": str(next(self._sequences))} for _ in range(0, len(data), piece)]
        starts = range(0, len(data), piece)
        self.chunks[name] = [
            Msg(None, data=data[start : start + piece], headers=header)  # type: ignore[arg-type]
            for start, header in zip(starts, headers, strict=True)
        ]
        digest = digest_of(hashlib.sha256(data).digest())
        self.files[name] = File(
            name=name, nuid=name, size=len(data), chunks=len(headers), digest=digest, metadata=metadata
        )
        return name


class InMemoryBatches:
    """As `Batches`, without a queue. `history` holds every record that was written, `announced` ids and statuses."""

    def __init__(self) -> None:
        self._kept: dict[str, Kept[BatchRecord]] = {}
        self._revisions = itertools.count(1)
        self.history: list[BatchRecord] = []
        self.announced: list[tuple[str, str]] = []

    async def get(self, batch_id: str) -> Kept[BatchRecord] | None:
        return self._kept.get(batch_id)

    async def put(self, record: BatchRecord, revision: int) -> int:
        kept = self._kept.get(record.id)
        if (kept.revision if kept else 0) != revision:
            raise QueueConflict("another write came first")
        self._kept[record.id] = Kept(record, next(self._revisions))
        self.history.append(record)
        return self._kept[record.id].revision

    async def announce(self, record: BatchRecord, status: str) -> None:
        self.announced.append((record.id, status))


class _Models:
    async def admit(self, name: str, _type: object) -> Asked:
        if name != MODEL:
            raise ModelNotFound(f"The model `{name}` does not exist or is not served here.", param="model")
        return Asked(name)


class Batched:
    """What a batch needs of an api, on `twins`."""

    def __init__(self, twins: Twins) -> None:
        self.twins = twins
        twins.mover()  # lines wait in the room
        self.files, self.batches = InMemoryFiles(), InMemoryBatches()
        self.stored = StoredRequests(
            twins.dispatcher,
            twins.queue,
            twins.states,
            twins.cancellation,
            twins.answers,
            None,  # type: ignore[arg-type]
            contextlib.nullcontext,
            None,  # type: ignore[arg-type]
            state_ttl_s=3_600,
        )
        self.context: Any = SimpleNamespace(
            settings=load(ApiSettings, _env_file=None),
            files=self.files,
            batches=self.batches,
            carried=CarriedRequests(twins.dispatcher, self.stored, twins.states, twins.answers),
            models=_Models(),
            dispatcher=twins.dispatcher,
            webhooks=SimpleNamespace(wanted=lambda *_: True),
            limits=SimpleNamespace(check_tokens=lambda _: None),
        )

    async def create(self, data: bytes, *, window: int = 10, expires_in_s: float = 60) -> BatchRecord:
        """A batch of a file that is uploaded now."""
        now = time.time()
        record = BatchRecord(
            id=f"batch_{len(self.batches.history):032x}",
            endpoint=URL,
            input_file_id=self.files.upload(data),
            completion_window="24h",
            created_at=now,
            expires_at=now + expires_in_s,
            kept_s=3_600,
            window=window,
        )
        await self.batches.put(record, 0)
        return record

    def run(self, record: BatchRecord, name: str = "run") -> "asyncio.Task[None]":
        """Run a batch, from where it is."""

        async def run() -> None:
            kept = await self.batches.get(record.id)
            assert kept is not None
            await Run(self.context, kept, name).run()

        return asyncio.create_task(run())

    async def record(self, record: BatchRecord) -> BatchRecord:
        """The batch as it is now."""
        kept = await self.batches.get(record.id)
        assert kept is not None
        return kept.record

    async def ends(self, record: BatchRecord) -> BatchRecord:
        """Run a batch to its end."""
        async with asyncio.timeout(20):
            while True:
                try:
                    await self.run(record)
                    break
                except QueueConflict:  # as the queue of batches does: again from where it is
                    continue
        ended = await self.record(record)
        assert ended.status in FINAL
        return ended

    async def lines(self, file_id: str | None) -> list[dict[str, Any]]:
        """The lines of an output file."""
        file = await self.files.get(file_id or "")
        if file is None:
            return []
        data = b"".join([chunk async for chunk in self.files.content(file)])
        assert len(data) == file.size
        return [json.loads(line) for line in data.splitlines()]

    async def close(self) -> None:
        """Follow nothing more."""
        await self.stored.close()


@contextlib.asynccontextmanager
async def batched(twins: Twins) -> AsyncIterator[Batched]:
    """`Batched` for the length of a block."""
    made = Batched(twins)
    try:
        yield made
    finally:
        await made.close()


def line(custom_id: str = "a", orders: str = "tokens=1", url: str = URL, method: str = "POST", **body: Any) -> bytes:
    """A line of an input file."""
    asked = {"model": MODEL, "messages": [{"role": "user", "content": f"[[{orders}]]"}], **body}
    return json.dumps({"custom_id": custom_id, "method": method, "url": url, "body": asked}).encode() + b"\n"
