"""The frames of an attempt, where sending them fails."""

from collections.abc import Sequence

import pytest
from nats.errors import ConnectionClosedError

from forebay_contracts.queueing.memory import InMemoryReplyChannel
from forebay_contracts.wire.frames import Delta, Frame, Resume
from forebay_inference.attempt.departures import Departures
from forebay_inference.attempt.reply import Reply
from forebay_inference.engine.events import Tokens
from support.twins import request


class FailingChannel(InMemoryReplyChannel):
    """Fails to send while `fails`."""

    fails = False

    async def send(self, frame: bytes) -> None:
        if self.fails:
            raise ConnectionClosedError
        await super().send(frame)


def tokens_of(frames: Sequence[Frame]) -> list[tuple[int, tuple[int, ...]]]:
    return [(frame.index, frame.tokens) for frame in frames if isinstance(frame, Delta)]


async def test_frames_whose_send_failed_are_sent_again() -> None:
    channel = FailingChannel(lambda frame: Resume())
    departures = Departures()
    assert departures.due(lambda: None)  # so that what comes next is held
    reply = Reply(channel, request(n=2), "w", departures)
    for index in (0, 1):
        await reply.send(Tokens(index, (1,), "a"))
        await reply.send(Tokens(index, (2,), "b"))
    channel.fails = True
    with pytest.raises(ConnectionClosedError):
        await reply._send_held()
    channel.fails = False
    channel.frames.clear()
    await reply.resend(Resume())
    assert tokens_of(channel.frames) == [(0, (1,)), (1, (1,)), (0, (2,)), (1, (2,))]
    reply.close()
