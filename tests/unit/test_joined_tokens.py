"""A stream's tokens after its first leave together, with those of the worker's other streams."""

import asyncio
from typing import Any

import pytest

from forebay_contracts.queueing.protocols import Superseded
from forebay_contracts.wire.errors import InferenceFailed
from forebay_contracts.wire.frames import Delta, Resume, decode_frame
from forebay_contracts.wire.state import Usage
from forebay_inference.attempt import departures
from forebay_inference.attempt.departures import Departures
from forebay_inference.attempt.reply import Reply
from forebay_inference.engine.events import Finished, Tokens
from support.twins import request

LONG_S = 60.0


class Channel:
    """Keeps the frames that are sent."""

    lossless = False

    def __init__(self) -> None:
        self.frames: list[Any] = []
        self.sent = asyncio.Event()

    async def send(self, frame: bytes) -> None:
        self.frames.append(decode_frame(frame))
        self.sent.set()

    async def ask(self, frame: bytes) -> Resume:
        self.frames.append(decode_frame(frame))
        return Resume(wanted=False)

    def deltas(self) -> list[tuple[int, int, tuple[int, ...], str]]:
        return [(one.index, one.offset, one.tokens, one.text) for one in self.frames if isinstance(one, Delta)]


@pytest.fixture
def channel(monkeypatch: pytest.MonkeyPatch) -> Channel:
    monkeypatch.setattr(departures, "INTERVAL_S", LONG_S)
    return Channel()


def streamed(channel: Channel, leaving: Departures | None = None) -> Reply:
    return Reply(channel, request("tokens=1"), "w1", leaving or just_left())


def just_left() -> Departures:
    found = Departures()
    assert found.due(lambda: None)
    return found


def token(number: int, *, index: int = 0, **fields: Any) -> Tokens:
    return Tokens(index, (number,), fields.pop("text", f" t{number}"), **fields)


async def test_the_first_token_of_each_choice_does_not_wait(channel: Channel) -> None:
    reply = streamed(channel)
    for index in (0, 1):
        await reply.send(token(0, index=index))
        await reply.send(token(1, index=index))
    assert channel.deltas() == [(0, 0, (0,), " t0"), (1, 0, (0,), " t0")]
    reply.finish({index: Finished(index, "stop") for index in (0, 1)}, Usage())
    await reply.complete()
    assert [(one.index, one.offset, one.tokens) for one in channel.frames[-1].deltas] == [(0, 1, (1,)), (1, 1, (1,))]


async def test_the_next_ones_come_together_in_time(channel: Channel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(departures, "INTERVAL_S", 0.02)
    reply = streamed(channel)
    await reply.send(token(0))
    channel.sent.clear()
    for number in (1, 2, 3):
        await reply.send(token(number))
    async with asyncio.timeout(30):
        await channel.sent.wait()
    assert channel.deltas() == [(0, 0, (0,), " t0"), (0, 1, (1, 2, 3), " t1 t2 t3")]


async def test_a_token_that_took_its_time_does_not_wait(channel: Channel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(departures, "INTERVAL_S", 0.0)
    reply = streamed(channel)
    for number in range(3):
        await reply.send(token(number))
    assert channel.deltas() == [(0, number, (number,), f" t{number}") for number in range(3)]


async def test_streams_leave_together(channel: Channel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(departures, "INTERVAL_S", 0.0)
    monkeypatch.setattr(departures, "LINGER_S", 0.01)
    leaving = Departures()
    one, other = streamed(channel, leaving), streamed(channel, leaving)
    for reply in (one, other):
        await reply.send(token(0))
    leaving._alone = False
    channel.frames.clear()
    channel.sent.clear()
    for reply in (one, other):
        await reply.send(token(1))
    assert channel.frames == []
    async with asyncio.timeout(30):
        while len(channel.frames) < 2:
            channel.sent.clear()
            await channel.sent.wait()
    assert channel.deltas() == [(0, 1, (1,), " t1")] * 2
    # Neither went alone, so the next one waits for the other again; one that is left alone does not, the next time.
    await one.send(token(2))
    assert len(channel.frames) == 2
    channel.sent.clear()
    async with asyncio.timeout(30):
        await channel.sent.wait()
    await one.send(token(3))
    assert channel.deltas()[2:] == [(0, 2, (2,), " t2"), (0, 3, (3,), " t3")]


async def test_what_kept_tokens_from_being_stored_stops_the_answer(channel: Channel) -> None:
    async def refuse(frame: bytes) -> None:
        raise Superseded("another attempt answers it")

    reply = streamed(channel)
    await reply.send(token(0))
    await reply.send(token(1))
    channel.send = refuse  # type: ignore[method-assign]
    reply._depart()
    with pytest.raises(Superseded):
        await reply.send(token(2))


async def test_reasoning_text_and_calls_keep_their_order(channel: Channel) -> None:
    reply = streamed(channel)
    await reply.send(token(0, text="", reasoning="Hm"))
    await reply.send(token(1, text="", reasoning="."))
    await reply.send(token(2))
    await reply.send(token(3, text="", tool_calls=({"index": 0},)))
    await reply.send(token(4))
    reply.close()
    texts = [(one.tokens, one.reasoning, one.text, len(one.tool_calls)) for one in channel.frames]
    assert texts == [((0,), "Hm", "", 0), ((1,), ".", "", 0), ((2,), "", " t2", 0), ((3,), "", "", 1)]


async def test_an_error_comes_after_the_tokens_before_it(channel: Channel) -> None:
    reply = streamed(channel)
    await reply.send(token(0))
    await reply.send(token(1))
    await reply.fail(InferenceFailed("broken"), final=False)
    assert [type(one).__name__ for one in channel.frames] == ["Delta", "Delta", "Failed"]


async def test_what_an_earlier_generation_held_does_not_leave_in_the_next(channel: Channel) -> None:
    reply = streamed(channel)
    for number in (0, 1):
        await reply.send(token(number))
    ask = channel.ask

    async def later(frame: bytes) -> Resume:
        reply._depart()
        await asyncio.sleep(0)
        return await ask(frame)

    channel.ask = later  # type: ignore[method-assign]
    reply.attempt = 2
    await reply.resume()
    assert channel.deltas() == [(0, 0, (0,), " t0")]
    await reply.send(token(5))  # the first one of its generation
    assert channel.deltas()[1:] == [(0, 0, (5,), " t5")]


async def test_the_receiver_says_how_an_answer_ended_that_could_not_go_on(channel: Channel) -> None:
    async def refuse(frame: bytes) -> None:
        raise Superseded("somebody else has ended the answer")

    reply = streamed(channel)
    for number in (0, 1):
        await reply.send(token(number))
    channel.send = refuse  # type: ignore[method-assign]
    reply._depart()
    assert await reply.fail(InferenceFailed("broken"), final=True) is None
    assert type(channel.frames[-1]).__name__ == "Failed"


async def test_nothing_leaves_after_the_end(channel: Channel) -> None:
    reply = streamed(channel)
    for number in (0, 1):
        await reply.send(token(number))
    reply.close()
    reply._depart()
    assert reply._flush is None


async def test_the_first_token_after_a_returned_prompt_does_not_wait(channel: Channel) -> None:
    reply = streamed(channel)
    await reply.send(token(0, prompt=True))
    await reply.send(token(1))
    assert [one.tokens for one in channel.frames] == [(0,), (1,)]
