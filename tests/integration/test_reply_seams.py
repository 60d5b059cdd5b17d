"""ReplyChannel and CancelNotices: the adapter on NATS and the in-memory twin of each pass the same tests."""

import asyncio
import time
from collections.abc import AsyncIterator

import pytest
from nats.aio.msg import Msg

from forebay_contracts.queueing import reply_channel
from forebay_contracts.queueing.cancellation import NatsCancelNotices
from forebay_contracts.queueing.memory import InMemoryCancelNotices, InMemoryReplyChannel
from forebay_contracts.queueing.protocols import CancelNotices, ReplyChannel
from forebay_contracts.queueing.reply_channel import CONFIRM_GRACE_S, LiveReplyChannel
from forebay_contracts.wire import names
from forebay_contracts.wire.frames import Delta, Frame, Resume, ResumedChoice, Started, decode_frame
from forebay_contracts.wire.state import RequestStatus
from support.nats import NatsServer
from support.seams import connected


class Receiver:
    """The other end of a reply channel."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.come = asyncio.Event()

    def receive(self, frame: Frame) -> Resume:
        self.frames.append(frame)
        self.come.set()
        return Resume(choices=(ResumedChoice(index=0, tokens=(7, 8)),))


@pytest.fixture(params=["memory", pytest.param("nats", marks=pytest.mark.nats)])
async def channel(request: pytest.FixtureRequest) -> AsyncIterator[tuple[ReplyChannel, Receiver]]:
    receiver = Receiver()
    if request.param == "memory":
        yield InMemoryReplyChannel(receiver.receive), receiver
        return
    async with connected(request.getfixturevalue("nats_server")) as connection:

        async def heard(msg: Msg) -> None:
            have = receiver.receive(decode_frame(msg.data))
            if msg.reply:
                await msg.respond(have.encode())

        await connection.client.subscribe("inference.replies.api.a", cb=heard)
        yield LiveReplyChannel(connection, "inference.replies.api.a", time.time() + 60, lambda: True), receiver


async def test_what_is_sent_arrives_as_it_is(channel: tuple[ReplyChannel, Receiver]) -> None:
    sender, receiver = channel
    delta = Delta(attempt=1, tokens=(7, 8), text="hi")
    await sender.send(delta.encode())
    await asyncio.wait_for(receiver.come.wait(), 30)
    assert receiver.frames == [delta]


async def test_asking_tells_what_the_receiver_has(channel: tuple[ReplyChannel, Receiver]) -> None:
    sender, receiver = channel
    started = Started(attempt=2, worker="w")
    have = await sender.ask(started.encode())
    assert have == Resume(choices=(ResumedChoice(index=0, tokens=(7, 8)),))
    assert receiver.frames == [started]


@pytest.mark.nats
@pytest.mark.nats
async def test_a_receiver_that_stands_still_is_gone_once_its_heartbeat_is(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reply_channel, "CONFIRM_TIMEOUT_S", 0.05)
    monkeypatch.setattr(reply_channel, "STALLED_S", 0.05)
    beats = iter([True, False])
    async with connected(nats_server) as connection:
        await connection.client.subscribe("inference.replies.stopped.a")
        stopped = LiveReplyChannel(connection, "inference.replies.stopped.a", time.time() + 60, lambda: next(beats))
        assert not (await stopped.ask(Started(attempt=1, worker="w").encode())).wanted
    assert next(beats, None) is None, "it was asked again as long as it had one"


async def test_a_receiver_that_is_gone_wants_nothing(nats_server: NatsServer) -> None:
    async with connected(nats_server) as connection:
        frame = Started(attempt=2, worker="w").encode()
        gone = LiveReplyChannel(connection, "inference.replies.gone.a", time.time() + 60, lambda: False)
        assert await gone.ask(frame) == Resume(wanted=False)
        # Alive by its heartbeat and never heard: by then its client has been told that the time is over.
        silent = LiveReplyChannel(connection, "inference.replies.gone.a", time.time() - CONFIRM_GRACE_S, lambda: True)
        assert await silent.ask(frame) == Resume(wanted=False, outcome=RequestStatus.TIMED_OUT)


Heard = asyncio.Queue[tuple[str, ...]]


@pytest.fixture(params=["memory", pytest.param("nats", marks=pytest.mark.nats)])
async def notices(request: pytest.FixtureRequest) -> AsyncIterator[tuple[CancelNotices, Heard]]:
    """Notices, and what is heard of them: `ask` or `tell`, the id, the reason."""
    heard: Heard = asyncio.Queue()
    if request.param == "memory":
        made = InMemoryCancelNotices()

        async def asked(request_id: str, reason: str) -> None:
            heard.put_nowait(("ask", request_id, reason))

        async def told(request_id: str, reason: str) -> None:
            heard.put_nowait(("tell", request_id, reason))

        made.on_ask.append(asked)
        made.on_tell.append(told)
        yield made, heard
        return
    async with connected(request.getfixturevalue("nats_server")) as connection:

        async def arrived(msg: Msg) -> None:
            kind = "ask" if names.HEADER_CANCEL in (msg.headers or {}) else "tell"
            heard.put_nowait((kind, msg.subject.rsplit(".", 1)[1], msg.data.decode()))

        await connection.client.subscribe(names.cancel_subject("*"), cb=arrived)
        yield NatsCancelNotices(connection), heard


async def test_a_question_and_a_notice_can_be_told_apart(
    notices: tuple[CancelNotices, Heard],
) -> None:
    sender, heard = notices
    await sender.ask("a", "why")
    await sender.tell("a", "because")
    assert await asyncio.wait_for(heard.get(), 30) == ("ask", "a", "why")
    assert await asyncio.wait_for(heard.get(), 30) == ("tell", "a", "because")
