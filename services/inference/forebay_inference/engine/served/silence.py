"""Finds out that an inference server answers no more."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from forebay_inference.engine.served.http import ServerGone

_ANSWER_S: Final = 10.0
"""Time for an answer."""


async def until_silent(ask: Callable[[], Awaitable[object]], pause_s: float, patience_s: float, gone_s: float) -> str:
    """Call `ask` again and again, each time after `pause_s`, until it has failed for `patience_s`, or for `gone_s` if
    nothing listens at the server's address. Returns how long the server has been silent."""
    loop = asyncio.get_running_loop()
    answer_s, silent_s = min(_ANSWER_S, patience_s), 0.0
    while True:
        await asyncio.sleep(pause_s)
        asked = loop.time()
        try:
            async with asyncio.timeout(answer_s):
                await ask()
            silent_s = 0.0
        except Exception as exc:  # an answer may be wrong in any way
            # While this process is stopped, the server cannot answer it.
            silent_s += min(loop.time() - asked, answer_s) + pause_s
            if silent_s >= (min(gone_s, patience_s) if isinstance(exc, ServerGone) else patience_s):
                return f"has not answered for {silent_s:.0f} s"
