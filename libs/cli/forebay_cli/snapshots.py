"""Streams as files, by JetStream's snapshot and restore: one folder a stream, in the layout of `nats account backup`.

A snapshot has the messages with their sequences, headers and times, and the consumers with what they have delivered.
"""

import json
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nats.aio.client import Client
from nats.aio.msg import Msg

from forebay_contracts.wire.errors import ConfigurationError, QueueUnavailable

_CHUNK_BYTES = 128 << 10
_CHUNK_TIMEOUT_S = 30.0
"""How long the server may take for one chunk, its check of the stream's files included."""

_ABOUT = "backup.json"
_DATA = "stream.tar.s2"
_WHOLE = "forebay.json"
"""The names of all streams of a backup. It is written last."""


class Saved(NamedTuple):
    """A stream in a backup."""

    name: str
    messages: int
    bytes: int


async def save(client: Client, stream: str, folder: Path) -> Saved | None:
    """Write `stream` into a new folder of its name below `folder`; None if there is no such stream.

    Raises:
        QueueUnavailable: the server stopped in the middle, or found the stream's files damaged.
    """
    inbox = client.new_inbox()
    subscription = await client.subscribe(inbox)
    try:
        asked = {"deliver_subject": inbox, "chunk_size": _CHUNK_BYTES, "jsck": True}
        answer = await _ask(client, f"$JS.API.STREAM.SNAPSHOT.{stream}", asked)
        if answer.get("error", {}).get("code") == 404:
            return None
        about = _checked(answer, stream)
        place = folder / stream
        # Also where the user made `folder`, so that others can read it.
        place.mkdir(parents=True, mode=0o700)
        with (place / _DATA).open("wb") as file:
            async for message in _chunks(subscription.next_msg, stream):
                file.write(message.data)
                if message.reply:  # the server sends so much and no more before it hears of that
                    await message.respond(b"")
        kept = {"config": about["config"], "state": about["state"]}
        (place / _ABOUT).write_text(json.dumps(kept, indent=2) + "\n")
        return _saved(kept)
    finally:
        await subscription.unsubscribe()


async def _chunks(receive: Any, stream: str) -> AsyncIterator[Msg]:
    while True:
        message = await receive(timeout=_CHUNK_TIMEOUT_S)
        if message.data:
            yield message
            continue
        # The last one is empty. Its status says whether that was all.
        status = (message.headers or {}).get("Status", "204")
        if status != "204":
            reason = (message.headers or {}).get("Description", "no reason given")
            raise QueueUnavailable(f"NATS broke off the backup of {stream}: {status} {reason}")
        return


async def restore(client: Client, saved: Saved, folder: Path, replicas: int) -> None:
    """Make the stream again, with `replicas` and all that `save` has written of it. It must not be there.

    Raises:
        ConfigurationError: the server refuses it, as for want of storage, or it lacks messages afterwards.
    """
    place = folder / saved.name
    about = json.loads((place / _ABOUT).read_text())
    about["config"]["num_replicas"] = replicas
    answer = await _ask(client, f"$JS.API.STREAM.RESTORE.{saved.name}", about)
    subject = _checked(answer, saved.name)["deliver_subject"]
    with (place / _DATA).open("rb") as file:
        for chunk in _parts(file):
            acknowledged = await client.request(subject, chunk, timeout=_CHUNK_TIMEOUT_S)
            if acknowledged.data.startswith(b"{"):
                _checked(json.loads(acknowledged.data), saved.name)
    made = _checked(json.loads((await client.request(subject, b"", timeout=_CHUNK_TIMEOUT_S)).data), saved.name)
    # What has outlived its time since the backup is not made again.
    if made["state"]["last_seq"] != about["state"]["last_seq"]:
        raise ConfigurationError(f"{saved.name} is not whole: NATS has {made['state']}, the backup {about['state']}")


def finish(folder: Path, saved: Sequence[Saved]) -> None:
    """Note that a backup is whole."""
    (folder / _WHOLE).write_text(json.dumps({"streams": [one.name for one in saved]}) + "\n")


def saved_in(folder: Path) -> list[Saved]:
    """The streams of a backup.

    Raises:
        ConfigurationError: `folder` holds none, or one that broke off.
    """
    if not (folder / _WHOLE).is_file():
        raise ConfigurationError(
            f"{folder} holds no whole backup: `forebay backup` makes one, and ends it with {_WHOLE}"
        )
    try:
        named = json.loads((folder / _WHOLE).read_text())["streams"]
        return [_saved(json.loads((folder / name / _ABOUT).read_text())) for name in named]
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise ConfigurationError(f"{folder} cannot be read as a backup: {exc}") from exc


def _saved(about: Any) -> Saved:
    return Saved(about["config"]["name"], about["state"]["messages"], about["state"]["bytes"])


def _parts(file: Any) -> Iterable[bytes]:
    parts: Iterator[bytes] = iter(lambda: file.read(_CHUNK_BYTES), b"")
    return parts


async def _ask(client: Client, subject: str, body: Any) -> Any:
    return json.loads((await client.request(subject, json.dumps(body).encode(), timeout=_CHUNK_TIMEOUT_S)).data)


def _checked(answer: Any, stream: str) -> Any:
    if "error" in answer:
        raise ConfigurationError(f"NATS refuses {stream}: {answer['error'].get('description')}")
    return answer
