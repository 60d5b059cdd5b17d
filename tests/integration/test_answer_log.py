"""AnswerLog: the stream and the in-memory twin pass the same tests. LoggedReplyChannel on both of them."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from forebay_contracts.queueing import answer_log, memory
from forebay_contracts.queueing.answer_log import JetStreamAnswerLog, following
from forebay_contracts.queueing.logged_reply import LoggedReplyChannel, have
from forebay_contracts.queueing.memory import InMemoryAnswerLog
from forebay_contracts.queueing.protocols import AnswerLog, Record, Superseded
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import AnswerTaken, RequestCancelled
from forebay_contracts.wire.frames import (
    Completed,
    Delta,
    FinishedChoice,
    Resume,
    ResumedChoice,
    Started,
    decode_frame,
    failed,
)
from forebay_contracts.wire.state import RequestStatus, Usage
from support.nats import NatsServer
from support.seams import connected


@pytest.fixture(params=["memory", pytest.param("nats", marks=pytest.mark.nats)])
async def answers(request: pytest.FixtureRequest) -> AsyncIterator[AnswerLog]:
    if request.param == "memory":
        yield InMemoryAnswerLog()
        return
    async with connected(request.getfixturevalue("nats_server")) as connection:
        yield JetStreamAnswerLog(connection)


def delta(offset: int, *tokens: int, attempt: int = 1) -> bytes:
    return Delta(attempt=attempt, offset=offset, tokens=tokens, text="x" * len(tokens)).encode()


def completed(tokens: int, attempt: int = 1) -> bytes:
    choices = (FinishedChoice(index=0, finish_reason="stop", tokens=tokens),)
    return Completed(attempt=attempt, choices=choices, usage=Usage()).encode()


STARTED = Started(attempt=1, worker="w").encode()


def channel(answers: AnswerLog, seconds: float = 60) -> LoggedReplyChannel:
    return LoggedReplyChannel(answers, "a", time.time() + seconds)


async def frames_of(answers: AnswerLog) -> list[bytes]:
    return [frame for record in await answers.read("a") for frame in record.frames]


class TestLog:
    async def test_records_come_back_in_order_and_as_they_were(self, answers: AnswerLog) -> None:
        before = time.time()
        first = await answers.append("a", [STARTED, delta(0, 1)], 0, "w.0")
        second = await answers.append("a", [delta(1, 2)], first, "w.1")
        await answers.append("b", [STARTED], 0, "w.0")
        records = await answers.read("a")
        assert [list(record.frames) for record in records] == [[STARTED, delta(0, 1)], [delta(1, 2)]]
        assert [record.sequence for record in records] == [first, second]
        assert all(before - 1 < record.at < time.time() + 1 for record in records)
        assert await answers.read("a", first) == records[1:]
        assert await answers.read("c") == []

    async def test_only_one_record_follows_another(self, answers: AnswerLog) -> None:
        first = await answers.append("a", [STARTED], 0, "w.0")
        with pytest.raises(AnswerTaken):
            await answers.append("a", [STARTED], 0, "other.0")
        await answers.append("a", [delta(0, 1)], first, "w.1")
        with pytest.raises(AnswerTaken):
            await answers.append("a", [delta(0, 1)], first, "other.1")
        assert await frames_of(answers) == [STARTED, delta(0, 1)]

    async def test_a_record_whose_confirmation_was_lost_is_stored_once(self, answers: AnswerLog) -> None:
        first = await answers.append("a", [STARTED], 0, "w.0")
        assert await answers.append("a", [STARTED], 0, "w.0") == first
        second = await answers.append("a", [delta(0, 1)], first, "w.1")
        assert await answers.append("a", [delta(0, 1)], first, "w.1") == second
        assert await frames_of(answers) == [STARTED, delta(0, 1)]

    async def test_a_reader_gets_what_is_there_and_what_comes(self, answers: AnswerLog) -> None:
        last = await answers.append("a", [STARTED], 0, "w.0")
        async with answers.follow("a") as coming:
            seen = [record async for record in _first(coming)]
            for number in range(20):
                last = await answers.append("a", [delta(number, number)], last, f"w.{number + 1}")
                await answers.append("b", [delta(number, number)], 0, f"w.{number}") if number == 0 else None
            while len(seen) < 21:
                seen += await asyncio.wait_for(anext(coming), 30)
        assert [record.sequence for record in seen] == [record.sequence for record in await answers.read("a")]

    async def test_a_reader_that_is_slow_holds_little_and_misses_nothing(
        self, answers: AnswerLog, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for module in (answer_log, memory):
            monkeypatch.setattr(module, "PAGE", 7)
        monkeypatch.setattr(answer_log, "MAX_HEARD", 5)
        last, seen = 0, list[Record]()
        async with answers.follow("a") as coming:
            for number in range(20):
                last = await answers.append("a", [delta(number, number)], last, f"w.{number}")
            while not seen or seen[-1].sequence < last:
                some = await asyncio.wait_for(anext(coming), 30)
                assert len(some) <= 7
                seen += some
            assert [frame for record in seen for frame in record.frames] == await frames_of(answers)
            for number in range(20, 40):
                last = await answers.append("a", [delta(number, number)], last, f"w.{number}")
            while seen[-1].sequence < last:
                seen += await asyncio.wait_for(anext(coming), 30)
        assert [record.sequence for record in seen] == [record.sequence for record in await answers.read("a")]

    async def test_a_removed_answer_is_gone(self, answers: AnswerLog) -> None:
        await answers.append("a", [STARTED], 0, "w.0")
        await answers.append("b", [STARTED], 0, "w.0")
        last = await answers.append("c", [completed(0)], await answers.append("c", [STARTED], 0, "w.0"), "w.1")
        await answers.purge("c", keep=1)
        assert [record.sequence for record in await answers.read("c")] == [last]
        with pytest.raises(AnswerTaken):
            await answers.append("c", [STARTED], 0, "x.0")
        await answers.purge("a")
        assert await answers.read("a") == []
        assert len(await answers.read("b")) == 1
        assert await answers.has_room()


async def _first(coming: AsyncIterator[list[Record]]) -> AsyncIterator[Record]:
    for record in await asyncio.wait_for(anext(coming), 30):
        yield record


class TestChannel:
    async def test_an_answer_is_its_frames_in_few_records(self, answers: AnswerLog) -> None:
        sender = channel(answers)
        sent = [STARTED, *(delta(number, number) for number in range(200))]
        for frame in sent:
            await sender.send(frame)
        assert await sender.ask(completed(200)) == Resume(wanted=False, outcome=RequestStatus.COMPLETED)
        assert await frames_of(answers) == [*sent, completed(200)]
        assert len(await answers.read("a")) < 50

    async def test_the_next_attempt_goes_on_and_the_older_one_is_refused(self, answers: AnswerLog) -> None:
        old, new = channel(answers), channel(answers)
        await old.send(STARTED)
        await old.send(delta(0, 7, 8))
        await _stored(answers, 2)
        assert await new.ask(Started(attempt=2, worker="x").encode()) == Resume(
            choices=(ResumedChoice(index=0, tokens=(7, 8)),)
        )
        await old.send(delta(2, 9))
        with pytest.raises(Superseded):
            await _send_until_it_raises(old)
        with pytest.raises(Superseded):
            await old.ask(completed(3))
        await new.send(delta(2, 9, attempt=2))
        await new.ask(completed(3, attempt=2))
        have_tokens = [
            token
            for frame in map(decode_frame, await frames_of(answers))
            if isinstance(frame, Delta)
            for token in frame.tokens
        ]
        assert have_tokens == [7, 8, 9]

    async def test_the_log_decides_how_an_answer_ends(self, answers: AnswerLog) -> None:
        sender = channel(answers)
        await sender.send(STARTED)
        await sender.send(delta(0, 1))
        await _stored(answers, 2)
        canceller = channel(answers)
        await canceller.ask(Started(attempt=2, worker="c").encode())
        await canceller.ask(failed(2, RequestCancelled("by its client")).encode())
        assert await sender.ask(completed(1)) == Resume(wanted=False, outcome=RequestStatus.CANCELLED)
        later = channel(answers)
        assert await later.ask(STARTED) == Resume(wanted=False, outcome=RequestStatus.CANCELLED)

    async def test_a_first_attempt_that_is_not_the_first_is_refused(self, answers: AnswerLog) -> None:
        await answers.append("a", [STARTED, delta(0, 1)], 0, "w.0")
        second = channel(answers)
        await second.send(STARTED)
        with pytest.raises(Superseded):
            await second.ask(completed(0))
        assert have(await answers.read("a")).choices[0].tokens == (1,)


@pytest.mark.parametrize("append_s", [0.005, 0.03])
async def test_a_flush_while_a_record_is_stored_leaves_nothing_to_store(append_s: float) -> None:
    class Slow(InMemoryAnswerLog):
        async def append(self, *args: Any) -> int:
            await asyncio.sleep(append_s)
            return await super().append(*args)

    slow = Slow()
    sender = channel(slow)
    await sender.send(STARTED)
    await sender.flush()
    await sender.send(delta(0, 1))
    await asyncio.sleep(0.002)  # it is being stored
    await sender.send(delta(1, 2))
    await sender.flush()
    assert await frames_of(slow) == [STARTED, delta(0, 1), delta(1, 2)]
    await asyncio.sleep(0.04)  # for the timer of a further record
    await sender.flush()


async def _send_until_it_raises(sender: LoggedReplyChannel) -> None:
    async with asyncio.timeout(30):
        while True:
            await sender.send(delta(3, 1))
            await asyncio.sleep(0.001)


async def _stored(answers: AnswerLog, frames: int) -> None:
    async with answers.follow("a") as coming:
        count = 0
        while count < frames:
            count += sum(len(record.frames) for record in await asyncio.wait_for(anext(coming), 30))


class TestRoom:
    @pytest.mark.nats
    async def test_what_was_asked_for_takes_room_too(self, nats_server: NatsServer) -> None:
        async with connected(nats_server) as connection:
            before = (await JetStreamAnswerLog(connection).size()).used
            bucket = await connection.jetstream.key_value(names.RESPONSES_BUCKET)
            await bucket.put("resp.open.1", b"x" * 100_000)
            assert (await JetStreamAnswerLog(connection).size()).used >= before + 100_000


class TestAway:
    async def test_an_answer_waits_while_the_log_is_full(self) -> None:
        answers = InMemoryAnswerLog()
        sender = channel(answers)
        answers.full = True
        await sender.send(STARTED)
        ending = asyncio.create_task(sender.ask(completed(0)))
        await asyncio.sleep(0.05)  # it has been refused once, which nobody hears of
        answers.full = False
        assert (await ending).outcome is RequestStatus.COMPLETED
        assert await frames_of(answers) == [STARTED, completed(0)]

    @pytest.mark.nats
    async def test_readers_and_writers_survive_a_killed_server(self, nats_server: NatsServer) -> None:
        async with connected(nats_server) as connection:
            answers = JetStreamAnswerLog(connection)
            sender = channel(answers)
            seen: dict[int, Sequence[bytes]] = {}
            done = asyncio.Event()

            async def read() -> None:
                async with answers.follow("a") as coming:
                    async for records in coming:
                        seen.update((record.sequence, record.frames) for record in records)
                        if records and records[-1].frames[-1] == completed(300):
                            done.set()
                            return

            reading = asyncio.create_task(read())
            sent = [STARTED, *(delta(number, number) for number in range(300))]
            for number, frame in enumerate(sent):
                await sender.send(frame)
                if number in (50, 200):
                    await asyncio.to_thread(nats_server.kill)
                    await asyncio.to_thread(nats_server.start)
                await asyncio.sleep(0.001)  # the pace of an engine
            await asyncio.wait_for(sender.ask(completed(300)), 60)
            await asyncio.wait_for(done.wait(), 60)
            await reading
            await connection.wait_connected(10)  # closed while it connects again, a client leaves a socket behind
            assert [frame for _, frames in sorted(seen.items()) for frame in frames] == [*sent, completed(300)]


def test_a_missed_message_makes_the_reader_read_the_log() -> None:
    def message(sequence: int, before: int) -> Msg:
        headers = {
            "Nats-Sequence": str(sequence),
            "Nats-Last-Sequence": str(before),
            "Nats-Time-Stamp": "2026-01-01T00:00:00.123456789Z",
        }
        return Msg(Client(), data=STARTED, headers=headers)

    assert following([message(5, 0), message(7, 5)], 0) == [
        Record(5, [STARTED], 1767225600.123456),
        Record(7, [STARTED], 1767225600.123456),
    ]
    assert following([message(5, 0), message(7, 5)], 5) is not None, "one that is known already is skipped"
    assert following([message(9, 7)], 5) is None
    assert following([message(9, 7)], 0) is None
    assert following([None], 5) is None
    assert following([], 5) is None
