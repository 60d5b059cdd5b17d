"""An upload: the file of a form goes into the store while it comes, in bounded memory."""

import contextlib
import hashlib
import uuid
from typing import Annotated, Any, Final, Literal

import orjson
from pydantic import Field
from starlette.requests import ClientDisconnect, Request

from forebay_api.http.bodies import validated
from forebay_api.in_flight.answer import ClientLeft
from forebay_api.in_flight.files import CHUNK_BYTES, File, FileMetadata, Files, digest_of
from forebay_api.openai.body import StrictModel
from forebay_api.openai.files.form import MAX_FIELDS_BYTES, Form
from forebay_contracts.nats import clock
from forebay_contracts.wire.errors import ApiError, InvalidRequest, RequestTooLarge

PREFIX: Final = "file-"
"""What the id of a file begins with."""


MAX_KEPT_S: Final = 2_592_000
"""The longest time that `expires_after` may say."""

LOOK_CHUNKS: Final = 64
"""An upload looks for room before each so many chunks: others come at the same time, and its length may be unknown."""


class ExpiresAfter(StrictModel):
    """How long a file is kept from its creation on."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=3_600, le=MAX_KEPT_S)]


class UploadFields(StrictModel):
    """The fields of the form beside the file."""

    purpose: Literal["batch", "user_data"]
    expires_after: ExpiresAfter | None = None


async def upload(request: Request, files: Files, key: str | None, max_bytes: int, ttl_s: float) -> File:
    """Store the file of the form that `request` sends, for `ttl_s` if it does not say for how long.

    Raises:
        InvalidRequest: it is no form, or a field is wrong.
        RequestTooLarge: the file is larger than `max_bytes`; not read any further.
        FileStoreFull, ClientLeft: nothing is stored.
    """
    length = request.headers.get("content-length", "0")
    size = int(length) if length.isdigit() else 0
    form = Form(request.headers.get("content-type", ""))
    if size > max_bytes + MAX_FIELDS_BYTES:
        raise _too_large(max_bytes)
    await files.need_room(size, key)
    writer = _Writer(files, uuid.uuid4().hex, max_bytes, key)
    try:
        async for piece in request.stream():
            if content := form.feed(piece):
                writer.ttl_s = writer.ttl_s or _seconds(form) or ttl_s
                await writer.write(content)
        form.finish()
        fields = _fields(form)
        kept_s = fields.expires_after.seconds if fields.expires_after else ttl_s
        if writer.last and kept_s > writer.ttl_s:
            raise InvalidRequest("`expires_after` must stand before the file in the form.", param="expires_after")
        return await writer.finish(form.filename or "", fields.purpose, kept_s)
    except BaseException as exc:
        with contextlib.suppress(ApiError):
            await files.purge(writer.nuid)
        if isinstance(exc, ClientDisconnect):
            raise ClientLeft("the client left while sending") from exc
        raise
    finally:
        files.coming[key] -= writer.stored


def _seconds(form: Form) -> float:
    """How long the form says, as far as it has come, that its file is to be kept; 0.0 if it does not say."""
    given = form.fields.get("expires_after[seconds]", "")
    return min(float(given), MAX_KEPT_S) if given.isdecimal() else 0.0


def _fields(form: Form) -> UploadFields:
    """The fields. Raises InvalidRequest."""
    given: dict[str, Any] = {}
    for name, value in form.fields.items():
        outer, _, inner = name.removesuffix("]").partition("[")
        if not inner:
            given[outer] = value
        elif isinstance(part := given.setdefault(outer, {}), dict):
            part[inner] = int(value) if value.isdecimal() and len(value) < 16 else value
    return validated(UploadFields, orjson.dumps(given))


class _Writer:
    """Cuts a file of `key` into chunks and stores them under `nuid`.

    `last`: the sequence of the last chunk. `stored`: bytes of all.
    """

    def __init__(self, files: Files, nuid: str, max_bytes: int, key: str | None) -> None:
        self._files = files
        self._key = key
        self._max_bytes = max_bytes
        self._buffer = bytearray()
        self._digest = hashlib.sha256()
        self._size = self._chunks = 0
        self.nuid = nuid
        self.ttl_s = 0.0
        self.stored = 0
        self.last = 0

    async def write(self, content: bytes) -> None:
        """Take the next bytes. Raises RequestTooLarge."""
        self._size += len(content)
        if self._size > self._max_bytes:
            raise _too_large(self._max_bytes)
        self._buffer += content
        while len(self._buffer) >= CHUNK_BYTES:
            await self._flush()

    async def _flush(self) -> None:
        chunk = bytes(self._buffer[:CHUNK_BYTES])
        del self._buffer[:CHUNK_BYTES]
        self._digest.update(chunk)
        if self._chunks % LOOK_CHUNKS == LOOK_CHUNKS - 1:
            await self._files.need_room(0, self._key)
        self.last = await self._files.append(self.nuid, chunk, self.last, self.ttl_s)
        self._files.coming[self._key] += len(chunk)
        self.stored += len(chunk)
        self._chunks += 1

    async def finish(self, filename: str, purpose: str, kept_s: float) -> File:
        """Store the rest, and what is known of the file."""
        self.ttl_s = max(self.ttl_s, kept_s)
        if self._buffer:
            await self._flush()
        now = int(clock.now())
        file = File(
            name=PREFIX + uuid.uuid4().hex,
            nuid=self.nuid,
            size=self._size,
            chunks=self._chunks,
            digest=digest_of(self._digest.digest()),
            metadata=FileMetadata(
                filename=filename,
                purpose=purpose,
                created_at=str(now),
                expires_at=str(int(now + kept_s)),
                key=self._key,
            ),
        )
        await self._files.put(file, kept_s)
        return file


def _too_large(max_bytes: int) -> RequestTooLarge:
    return RequestTooLarge(f"The file is larger than {max_bytes} bytes.", param="file")
