"""Files: the NATS object store `inference-files`, in the layout of ADR-20, so `nats object` reads it too.

The store of nats-py takes a thread a chunk, reads through a consumer, which the api's user may not make, and ends no
read whose link died. Here the chunks of a file are appended one after the other. Each names the one before it, so the
server refuses a second writer. What is known of the file is stored last: a half file is never listed. Each message has
a TTL, so the server itself removes files.
"""

import asyncio
import base64
import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Final

from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.js.api import StreamInfo
from nats.js.errors import APIError
from pydantic import Field, ValidationError

from forebay_api.clients.fair_part import may_hold
from forebay_contracts.nats import direct_get
from forebay_contracts.nats.connection import Connection
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import FileStoreFull, QueueConflict, QueueUnavailable, StateUnreadable
from forebay_contracts.wire.message import Message

CHUNK_BYTES: Final = 128 * 1024
"""Largest chunk of a file."""

PAGE: Final = 8
"""Most chunks that are read at once."""

SCAN: Final = 200
"""Most files of which a scan holds what is known."""

CHUNK_GRACE_S: Final = 21_600
"""How much longer than its file a chunk is kept. An upload may take so long."""

ROOM: Final = 0.9
"""The part of the store that uploads may fill. The rest is for the output of batches."""

TRY_S: Final = 2.0
"""How long one try at a request to the store may take."""

PATIENCE_S: Final = 10.0
"""How long a write is tried while NATS is away."""

RETRY_S: Final = 0.1
"""Pause between two tries."""

SWEEP_S: Final = 600.0
"""Least time between two sweeps of a full store."""

ORPHAN_S: Final = 3_600.0
"""Age of the newest chunk of an upload whose api must have died."""

BATCH_CHUNKS: Final = "batch"
"""What the names of chunks begin with that a batch writes. They belong to no file until the batch ends."""

_STREAM: Final = names.object_stream(names.FILES_BUCKET)
_GET: Final = f"$JS.API.DIRECT.GET.{_STREAM}"
_STORE_FAILED = 10077
_WRONG_LAST_SEQUENCE = (10071, 10164)
_NOT_NOW = (409, 429, 503)

log = logging.getLogger(__name__)


class FileMetadata(Message):
    """What Forebay adds to ADR-20. `key`: the name of the owner's key. Times: whole seconds since the epoch."""

    filename: str
    purpose: str
    created_at: str
    expires_at: str
    key: str | None = None


class File(Message):
    """A file, in the form of ADR-20. `nuid` names its chunks."""

    name: str
    bucket: str = names.FILES_BUCKET
    nuid: str
    size: int
    chunks: int
    digest: str
    mtime: str = ""
    options: dict[str, int] = Field(default_factory=lambda: {"max_chunk_size": CHUNK_BYTES})
    metadata: FileMetadata

    def encode(self) -> bytes:
        """As JSON with all fields."""
        return self.model_dump_json(exclude_none=True).encode()


class Files:
    """The store. Each method raises QueueUnavailable without an answer from NATS."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._requests = connection.requests
        self._swept_at = float("-inf")
        self.coming: Counter[str | None] = Counter()
        """Bytes of the uploads that come to this api now, by key."""

    async def append(self, nuid: str, data: bytes, last: int, ttl_s: float, lines: str | None = None) -> int:
        """Add a chunk after sequence `last` (0: it is the first); returns its sequence.

        Raises:
            QueueConflict: another chunk follows `last`.
            FileStoreFull: nothing was stored.
        """
        # A chunk is told from that of another writer by its name.
        name = f"{nuid}.{time.time_ns():x}"
        headers = {names.HEADER_MSG_ID: name, names.HEADER_TTL: str(int(ttl_s) + CHUNK_GRACE_S)}
        if lines is not None:
            headers[names.HEADER_LINES] = lines
        return await self._store(names.chunk_subject(names.FILES_BUCKET, nuid), data, last, headers)

    async def read(self, nuid: str, after: int = 0) -> AsyncIterator[list[Msg]]:
        """The chunks of a file with a sequence above `after`, at most PAGE at once."""
        subject, found = names.chunk_subject(names.FILES_BUCKET, nuid), list[Msg]()
        while not found or len(found) == PAGE:
            found = await self._read(subject, after + 1, PAGE)
            if not found:
                return
            yield found
            after = sequence_of(found[-1])

    async def content(self, file: File) -> AsyncIterator[bytes]:
        """The bytes of a file. Raises QueueUnavailable at its end if they are not those that were stored."""
        digest, size = hashlib.sha256(), 0
        async for page in self.read(file.nuid):
            for msg in page:
                digest.update(msg.data)
                size += len(msg.data)
                yield msg.data
        if size != file.size or digest_of(digest.digest()) != file.digest:
            raise QueueUnavailable(f"the content of {file.name} is not whole, try again later")

    async def put(self, file: File, ttl_s: float) -> None:
        """Make a file of chunks that are stored. The same file again changes nothing."""
        subject = names.object_subject(names.FILES_BUCKET, file.name)
        headers = {names.HEADER_MSG_ID: file.name, names.HEADER_TTL: str(max(int(ttl_s), 1))}
        await self._store(subject, file.encode(), 0, headers)

    async def get(self, file_id: str) -> File | None:
        """A file, or None if there is none. Raises StateUnreadable if another program wrote it."""
        msg = await self._last(names.object_subject(names.FILES_BUCKET, file_id))
        return None if msg is None else _decoded(msg)

    async def scan(self) -> AsyncIterator[File]:
        """All files, oldest first. What another program has stored is left out."""
        subjects, after, found = names.object_subjects(names.FILES_BUCKET)[1], 0, list[Msg]()
        while not after or len(found) == SCAN:
            found = await self._read(subjects, after + 1, SCAN)
            after = sequence_of(found[-1]) if found else -1
            for msg in found:
                try:
                    yield _decoded(msg)
                except StateUnreadable as exc:
                    log.debug("left out: %s", exc)

    async def delete(self, file: File) -> None:
        """Remove a file."""
        await self._purge(names.object_subject(names.FILES_BUCKET, file.name))
        await self.purge(file.nuid)

    async def purge(self, nuid: str) -> None:
        """Remove chunks."""
        await self._purge(names.chunk_subject(names.FILES_BUCKET, nuid))

    async def remove(self, sequence: int) -> None:
        """Remove one chunk."""
        await self._ask(f"$JS.API.STREAM.MSG.DELETE.{_STREAM}", {"seq": sequence, "no_erase": True})

    async def need_room(self, size: int, key: str | None = None) -> None:
        """Raises FileStoreFull if an upload of `size` bytes, by the key of this name, leaves no room."""
        free, used = await self._room()
        if free < size and time.monotonic() - self._swept_at > SWEEP_S:
            self._swept_at = time.monotonic()
            await self._sweep()
            free, used = await self._room()
        if free < size:
            raise FileStoreFull("no room is left for further files: delete some, or set FILE_STORE_BYTES")
        if key is None or may_hold(used + size, free - size):
            return
        own = self.coming[key] + sum([file.size async for file in self.scan() if file.metadata.key == key])
        if not may_hold(own + size, free - size):
            raise FileStoreFull(f"your key `{key}` has {own} bytes of files, and others need room: delete some of them")

    async def _room(self) -> tuple[float, int]:
        """How many bytes uploads may still take, and how many are stored."""
        info = await self._info()
        most = info.config.max_bytes or -1
        return most * ROOM - info.state.bytes if most > 0 else float("inf"), info.state.bytes

    async def _sweep(self) -> None:
        """Remove the chunks of files that have expired, and of uploads whose api died."""
        known = {file.nuid async for file in self.scan()}
        subjects = names.object_subjects(names.FILES_BUCKET)[0]
        stored = (await self._info(subjects)).state.subjects or {}
        for subject, chunks in stored.items():
            nuid = subject.rsplit(".", 1)[-1]
            if nuid in known or nuid.startswith(BATCH_CHUNKS):
                continue
            msg = await self._last(subject)
            newest = datetime.fromisoformat((msg.headers or {})["Nats-Time-Stamp"]).timestamp() if msg else 0.0
            if time.time() - newest > ORPHAN_S:
                log.info("[Files] %d chunks without a file are removed", chunks)
                await self._purge(subject)

    async def _info(self, subjects: str | None = None) -> StreamInfo:
        try:
            return await self._connection.jetstream.stream_info(_STREAM, subjects_filter=subjects)
        except (NatsError, TimeoutError) as exc:
            raise QueueUnavailable("the file store cannot be reached, try again later") from exc

    async def _store(self, subject: str, data: bytes, last: int, headers: dict[str, str]) -> int:
        give_up_at = time.monotonic() + PATIENCE_S
        headers["Nats-Expected-Last-Subject-Sequence"] = str(last)
        while True:
            try:
                return await self._requests.store(subject, data, timeout_s=TRY_S, headers=headers)
            except APIError as exc:
                if exc.err_code in _WRONG_LAST_SEQUENCE:
                    return await self._stored_before(subject, headers[names.HEADER_MSG_ID])
                if exc.err_code == _STORE_FAILED and "exceeded" in (exc.description or ""):
                    raise FileStoreFull("the file store is full: delete files, or set FILE_STORE_BYTES") from exc
                if exc.code not in _NOT_NOW:
                    raise QueueUnavailable(f"nothing was stored: {exc.description}") from exc
                failure: Exception = exc
            except (NatsError, TimeoutError) as exc:
                failure = exc
            if (patience_s := give_up_at - time.monotonic()) <= 0:
                raise QueueUnavailable("the file store cannot be reached, try again later") from failure
            await self._connection.wait_connected(patience_s)
            await asyncio.sleep(RETRY_S)

    async def _stored_before(self, subject: str, name: str) -> int:
        """The sequence of a message whose confirmation was lost. Raises QueueConflict if another one is there."""
        msg = await self._last(subject)
        if msg is None or (msg.headers or {}).get(names.HEADER_MSG_ID) != name:
            raise QueueConflict(f"{subject}: another write came first")
        return sequence_of(msg)

    async def _last(self, subject: str) -> Msg | None:
        msg = await self._ask(f"{_GET}.{subject}", None)
        headers = msg.headers or {}
        if "Nats-Sequence" not in headers and headers.get("Status") != "404":
            raise QueueUnavailable(f"the file store cannot be read: {headers.get('Description')}")
        return msg if "Nats-Sequence" in headers else None

    async def _read(self, subjects: str, first: int, most: int) -> list[Msg]:
        try:
            return await direct_get.messages(self._connection, _STREAM, subjects, first, most)
        except (NatsError, TimeoutError) as exc:
            raise QueueUnavailable("the file store cannot be read, try again later") from exc

    async def _purge(self, subject: str) -> None:
        await self._ask(f"$JS.API.STREAM.PURGE.{_STREAM}", {"filter": subject})

    async def _ask(self, subject: str, order: dict[str, object] | None) -> Msg:
        data = b"" if order is None else json.dumps(order).encode()
        try:
            return await self._requests.request(subject, data, timeout_s=PATIENCE_S / 2)
        except (NatsError, TimeoutError) as exc:
            raise QueueUnavailable("the file store cannot be reached, try again later") from exc


def digest_of(sha256: bytes) -> str:
    """A SHA-256 as ADR-20 writes it."""
    return "SHA-256=" + base64.urlsafe_b64encode(sha256).decode()


def sequence_of(msg: Msg) -> int:
    """The sequence of a chunk that was read."""
    return int((msg.headers or {})["Nats-Sequence"])


def _decoded(msg: Msg) -> File:
    try:
        return File.model_validate_json(msg.data)
    except ValidationError:
        raise StateUnreadable("what is known of the file cannot be read: another program wrote it") from None
