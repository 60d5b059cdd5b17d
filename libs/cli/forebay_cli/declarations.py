"""What the declarations of several commands share."""

import asyncio
import functools
import re
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any, ParamSpec

import typer

from forebay_contracts.wire.errors import ConfigurationError

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

DataDir = Annotated[
    Path | None, typer.Option(help="Ask the `forebay up` that runs on this folder.", show_default="DATA_DIR")
]

NatsUrl = Annotated[
    str | None, typer.Option(help="Ask this NATS server.", show_default="NATS_URL, else that of `forebay up`")
]

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(s|m|h|d)")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}

P = ParamSpec("P")


def synchronous(command: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """A command that runs the coroutine `command` to its end; typer knows no coroutines."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        asyncio.run(command(*args, **kwargs))

    return run


def duration_s(text: str) -> float:
    """Seconds of `90s`, `10m`, `2h`, `1d` or `1h30m`.

    Raises:
        ConfigurationError: `text` is none of these.
    """
    parts = _DURATION.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ConfigurationError(f"{text!r} is no duration: write 90s, 10m, 2h or 1h30m")
    return sum(float(number) * _SECONDS[unit] for number, unit in parts)
