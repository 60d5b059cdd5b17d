"""What a check of `forebay doctor` finds."""

from dataclasses import dataclass
from typing import Literal

Severity = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """The result of one check; `fix` says what to do about it."""

    check: str
    severity: Severity
    message: str
    fix: str = ""


def size(count: float) -> str:
    """A number of bytes in its largest unit, as 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
