"""Records of what is stored for clients: values of a KV bucket, of `inference-responses` or `inference-batches`.

A key is `<kind>.<owner>.<id>`. So what belongs to another key of the api is not found, and an owner's records of one
kind can be listed, oldest first.
"""

import hashlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.errors import MaxPayloadError
from nats.js.errors import APIError
from pydantic import ValidationError

from forebay_contracts.nats import direct_get
from forebay_contracts.nats.connection import Connection
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import QueueConflict, QueueUnavailable, RequestTooLarge, StateUnreadable
from forebay_contracts.wire.message import Message

RECORD_TIMEOUT_S: Final = 5.0
"""How long one read or write may take."""

SCAN: Final = 50
"""Most records that a scan holds at once. Each may have the size of a message."""

_WRONG_LAST_SEQUENCE = (10071, 10164)
_DELETED = {"KV-Operation": "DEL"}

R = TypeVar("R", bound=Message)


@dataclass(frozen=True, slots=True)
class Kept(Generic[R]):
    """A record as it was read. A change of it must name `revision`."""

    record: R
    revision: int


def owner_token(owner: str | None) -> str:
    """The part of a record's key that stands for the client's key of this name."""
    return hashlib.sha256(owner.encode()).hexdigest()[:16] if owner is not None else "open"


def key_of(kind: str, owner: str | None, identifier: str) -> str:
    """The key of a record. `owner` is the name of a client's key."""
    return f"{kind}.{owner_token(owner)}.{identifier}"


class Records:
    """The bucket. Each method raises QueueUnavailable without an answer from NATS."""

    def __init__(self, connection: Connection, bucket: str = names.RESPONSES_BUCKET) -> None:
        self._connection = connection
        self._requests = connection.requests
        self._bucket = bucket
        self._stream = names.bucket_stream(bucket)

    async def get(self, key: str, kind: type[R]) -> Kept[R] | None:
        """The record, or None if there is none. Raises StateUnreadable if another version wrote it."""
        subject = f"$JS.API.DIRECT.GET.{self._stream}.{names.bucket_subject(self._bucket, key)}"
        try:
            msg = await self._requests.request(subject, timeout_s=RECORD_TIMEOUT_S)
        except (NatsError, TimeoutError) as exc:
            raise QueueUnavailable("what is stored cannot be read, try again later") from exc
        headers = msg.headers or {}
        if headers.get("Status") == "404" or "KV-Operation" in headers:
            return None
        if "Nats-Sequence" not in headers:
            raise QueueUnavailable(f"what is stored cannot be read: {headers.get('Description')}")
        return Kept(_decoded(kind, msg.data), int(headers["Nats-Sequence"]))

    async def put(self, key: str, record: Message, revision: int = 0) -> int:
        """Replace `revision` (0: none); returns the new one.

        Raises:
            QueueConflict: `revision` is not the last.
            RequestTooLarge: the record is larger than a message of NATS may be.
        """
        return await self._store(key, record.encode(), {"Nats-Expected-Last-Subject-Sequence": str(revision)})

    async def delete(self, key: str) -> None:
        """Remove a record. A mark of it stays until the bucket's TTL."""
        await self._store(key, b"", _DELETED)

    async def scan(self, kind: str, owner: str | None, record: type[R]) -> AsyncIterator[R]:
        """All records of an owner, in the order in which they were written."""
        subjects = names.bucket_subject(self._bucket, key_of(kind, owner, "*"))
        after, found = 0, list[Msg]()
        while not after or len(found) == SCAN:
            try:
                found = await direct_get.messages(self._connection, self._stream, subjects, after + 1, SCAN)
            except (NatsError, TimeoutError) as exc:
                raise QueueUnavailable("what is stored cannot be read, try again later") from exc
            after = int((found[-1].headers or {})["Nats-Sequence"]) if found else -1
            for msg in found:
                if "KV-Operation" not in (msg.headers or {}):
                    yield _decoded(record, msg.data)

    async def _store(self, key: str, data: bytes, headers: dict[str, str]) -> int:
        subject = names.bucket_subject(self._bucket, key)
        try:
            return await self._requests.store(subject, data, timeout_s=RECORD_TIMEOUT_S, headers=headers)
        except MaxPayloadError as exc:
            most = self._connection.client.max_payload
            raise RequestTooLarge(f"what is to be stored takes {len(data)} bytes, and NATS takes {most}") from exc
        except APIError as exc:
            if exc.err_code in _WRONG_LAST_SEQUENCE:
                raise QueueConflict("another write came first, try again") from exc
            raise QueueUnavailable(f"nothing was stored: {exc.description}") from exc
        except (NatsError, TimeoutError) as exc:
            raise QueueUnavailable("nothing was stored, try again later") from exc


def _decoded(kind: type[R], data: bytes) -> R:
    try:
        return kind.model_validate_json(data)
    except ValidationError:
        raise StateUnreadable("what is stored cannot be read: another version of the api wrote it") from None
