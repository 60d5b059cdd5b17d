"""How a message is made, and how its tokens are counted."""

from typing import Final

from forebay_api.anthropic.messages.format import CountFormat, MessagesFormat
from forebay_api.context import Context
from forebay_api.prepare import Accepted, Prepared, live

BEGINS_AFTER_S: Final = 1.0
"""A stream whose request waits longer begins, with pings. Until then an error is an HTTP status."""

count = live(CountFormat)
_whole = live(MessagesFormat)


async def answer(context: Context, accepted: Accepted) -> Prepared:
    """A message."""
    prepared = await _whole(context, accepted)
    return Prepared(prepared.request, prepared.format, prepared.answered, begins_after_s=BEGINS_AFTER_S)
