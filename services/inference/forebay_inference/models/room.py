"""Whether the disk has room for what is to be fetched."""

import errno
import shutil
from pathlib import Path


def require_room(folder: Path, size_bytes: float) -> None:
    """Raise OSError (ENOSPC) where the disk of `folder` has less than `size_bytes` free."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    if free < size_bytes:
        text = f"the disk is full: {_mb(size_bytes)} are needed, and {_mb(free)} are free"
        raise OSError(errno.ENOSPC, text, str(folder))


def clause(reason: str) -> str:
    """The reason of an OSError, to go on a sentence."""
    return reason[:1].lower() + reason[1:]


def _mb(size_bytes: float) -> str:
    return f"{size_bytes / 1e6:,.1f} MB"
