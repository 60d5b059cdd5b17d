"""Writes an answer as events while it comes."""

import asyncio
import contextlib

from forebay_api.http.sse import EventStream
from forebay_api.in_flight.answer import ClientLeft, SlowReader
from forebay_api.in_flight.live_answer import LiveAnswer
from forebay_api.openai.format import StreamWriter
from forebay_contracts.wire.errors import ApiError, ApiStopped


async def write_stream(
    answer: LiveAnswer, writer: StreamWriter, stream: EventStream, *, early: bool
) -> ApiError | None:
    """Write the answer as events while it comes; returns the error that it ended with.

    An error is the last event; a client that left, or does not read, gets none. `early`: no worker has begun yet.
    """
    try:
        if early:
            await stream.write(writer.queued())
            await answer.started()
        await stream.write(writer.opening())
        async for deltas in answer.deltas():
            await stream.write(b"".join(map(writer.chunk, deltas)))
        assert answer.completed is not None
        await stream.write(writer.closing(answer.completed), last=True)
    except (ClientLeft, SlowReader) as exc:
        answer.fail(exc)
    except (ApiError, asyncio.CancelledError) as exc:
        # uvicorn cancels what runs at the end of DRAIN_TIMEOUT.
        error = ApiStopped() if isinstance(exc, asyncio.CancelledError) else exc
        with contextlib.suppress(SlowReader):
            await stream.write(writer.failure(error), last=True)
        return error
    return None
