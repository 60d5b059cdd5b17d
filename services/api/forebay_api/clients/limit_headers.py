"""OpenAI's `x-ratelimit-*` headers (https://platform.openai.com/docs/guides/rate-limits)."""

from collections.abc import Iterator
from typing import Final

NAMES: Final = tuple(
    f"x-ratelimit-{what}-{kind}" for what in ("limit", "remaining", "reset") for kind in ("requests", "tokens")
)


def headers(kind: str, limit: int, left: int, reset_s: float | None = None) -> Iterator[tuple[bytes, bytes]]:
    """Those of one limit, on `requests` or `tokens`. `reset_s`: seconds until all of it is there, if that is known."""
    yield f"x-ratelimit-limit-{kind}".encode(), str(limit).encode()
    yield f"x-ratelimit-remaining-{kind}".encode(), str(left).encode()
    if reset_s is not None:
        yield f"x-ratelimit-reset-{kind}".encode(), duration(reset_s).encode()


def duration(seconds: float) -> str:
    """As OpenAI writes it: `17ms`, `1s`, `6m0s`, `7h12m3s`."""
    if seconds < 1:
        return f"{int(seconds * 1000)}ms"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (f"{hours}h" if hours else "") + (f"{minutes}m" if hours or minutes else "") + f"{rest}s"
