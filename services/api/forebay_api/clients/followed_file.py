"""A file of the operator's that is read again when it changes."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from forebay_contracts.keys import MAX_FILE_BYTES
from forebay_contracts.wire.errors import ConfigurationError

REREAD_S = 2.0
"""How often the file is read. It is not watched: Kubernetes swaps a mounted Secret by a link above it."""

log = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def followed(setting: str, file: Path | None, what: str, use: Callable[[str], int]) -> AsyncIterator[None]:
    """Read `file`, the value of `setting`, and follow its changes for the length of a block; None: nothing.

    `use` takes the text of a file of `what`, and returns how many names it holds. What it refuses later is not used.

    Raises:
        ConfigurationError: at the start, the file is unreadable or not valid.
    """
    if file is None:
        yield
        return
    text = _read(setting, file)
    _used(setting, file, text, use)
    follower = asyncio.create_task(_follow(setting, file, text, what, use))
    try:
        yield
    finally:
        follower.cancel()


async def _follow(setting: str, file: Path, text: str, what: str, use: Callable[[str], int]) -> None:
    complaint = ""
    while True:
        await asyncio.sleep(REREAD_S)
        try:
            if (new := _read(setting, file)) != text:
                log.info("[RequestQueue] the %s file has changed: %d names", what, _used(setting, file, new, use))
                text = new
            complaint = ""
        except ConfigurationError as exc:
            # It may be half written. What it held before is valid until it is repaired.
            if (said := str(exc)) != complaint:
                log.error("[RequestQueue] %s; the %s of before stay", said, what)
                complaint = said


def _used(setting: str, file: Path, text: str, use: Callable[[str], int]) -> int:
    try:
        return use(text)
    except ConfigurationError as exc:
        raise ConfigurationError(f"{setting}={file}: {exc}") from None


def _read(setting: str, file: Path) -> str:
    try:
        with file.open("rb") as opened:
            data = opened.read(MAX_FILE_BYTES + 1)
        # Before it is decoded: what was read may end within a character.
        if len(data) > MAX_FILE_BYTES:
            raise ConfigurationError(f"{setting}={file} is larger than {MAX_FILE_BYTES} bytes")
        return data.decode()
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is not UTF-8"
        raise ConfigurationError(f"{setting}={file} cannot be read: {reason}") from None
