"""Requests whose answer is stored, on the twins: apis, workers and clients come and go."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from forebay_api.in_flight import live_answer, stored
from forebay_api.in_flight.live_answer import LiveAnswer
from forebay_api.in_flight.stored import StoredRequests
from forebay_contracts.nats import clock
from forebay_contracts.queueing import memory
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import AnswerLogFull, ApiError
from forebay_contracts.wire.frames import Failed, decode_frame
from forebay_contracts.wire.request import InferenceRequest
from forebay_contracts.wire.state import RequestState, RequestStatus
from support.twins import Twins, request, twins

NONE: Any = None
"""Stands for what these requests do not use."""


def stored_request(orders: str = "", seconds: float = 30) -> InferenceRequest:
    made = request(orders)
    return made.model_copy(update={"reply_to": names.answer_subject(made.id), "deadline": made.created_at + seconds})


def an_api(system: Twins, state_ttl_s: float = 3_600) -> StoredRequests:
    return StoredRequests(
        system.dispatcher,
        system.queue,
        system.states,
        system.cancellation,
        system.answers,
        NONE,
        contextlib.nullcontext,
        NONE,
        state_ttl_s=state_ttl_s,
    )


@pytest.fixture
async def system() -> AsyncIterator[Twins]:
    async with twins() as made:
        yield made


async def text_of(answer: LiveAnswer) -> str:
    async with asyncio.timeout(30):
        return "".join([delta.text async for some in answer.deltas() for delta in some])


WHOLE = " ".join(f"t{number}" for number in range(20))


async def test_a_stored_answer_is_read_while_it_runs_and_after(system: Twins) -> None:
    api, other = an_api(system), an_api(system)
    wanted = stored_request("tokens=20 delay_ms=1")
    system.worker()
    async with api.submit(wanted) as answer, other.read(wanted) as elsewhere:
        assert await asyncio.gather(text_of(answer), text_of(elsewhere)) == [WHOLE, WHOLE]
    async with other.read(wanted) as later:
        assert await text_of(later) == WHOLE
    now = await api.so_far(wanted)
    assert now.outcome is RequestStatus.COMPLETED
    assert now.completed is not None
    assert now.completed.usage.completion_tokens == 20
    assert (await system.reaches(wanted.id, RequestStatus.COMPLETED)).logged
    await system.empty()


async def test_a_client_and_an_api_that_leave_end_nothing(system: Twins) -> None:
    api, other = an_api(system), an_api(system)
    wanted = stored_request("tokens=20 delay_ms=5")
    system.worker()
    async with api.submit(wanted) as answer:
        await answer.started()
    system.alive = False
    await api.close()
    async with other.read(wanted) as later:
        assert await text_of(later) == WHOLE
    await system.reaches(wanted.id, RequestStatus.COMPLETED)


async def test_a_worker_that_dies_is_followed_without_a_word_lost_or_doubled(system: Twins) -> None:
    api = an_api(system)
    wanted = stored_request("tokens=20 delay_ms=5")
    first = system.runner("w1")
    async with api.submit(wanted) as answer:
        delivery = await system.queue.pull()
        dying = asyncio.create_task(first.run(delivery))
        async with asyncio.timeout(30):
            while not (await system.answers.read(wanted.id))[1:]:  # noqa: ASYNC110 - the worker tells no test
                await asyncio.sleep(0.001)
        dying.cancel()
        system.worker("w2")
        system.queue.forget_deliveries()
        assert await text_of(answer) == WHOLE
        assert answer.attempt == 2
    frames = [frame for record in await system.answers.read(wanted.id) for frame in record.frames]
    assert sum(frame.startswith(b'{"type":"started"') for frame in frames) == 2


async def test_two_attempts_at_once_write_one_answer(system: Twins) -> None:
    """As after a killed NATS that delivers again what still runs on another worker."""
    api = an_api(system)
    wanted = stored_request("tokens=40 delay_ms=2")
    system.worker("w1", slots=1)
    async with api.submit(wanted) as answer:
        await answer.started()
        system.worker("w2", slots=1)
        system.queue.forget_deliveries()
        assert await text_of(answer) == " ".join(f"t{number}" for number in range(40))
    await system.reaches(wanted.id, RequestStatus.COMPLETED)


async def test_what_nats_lost_is_published_again(system: Twins) -> None:
    api = an_api(system)
    wanted = stored_request("tokens=20")
    async with api.submit(wanted) as answer:
        await system.reaches(wanted.id, RequestStatus.QUEUED)
        system.queue.lose(1)
        system.worker()
        api.look_after_an_outage()
        assert await text_of(answer) == WHOLE


async def test_what_was_published_again_is_not_lost_at_the_next_outage(
    system: Twins, caplog: pytest.LogCaptureFixture
) -> None:
    api = an_api(system)
    wanted = stored_request("tokens=20")
    async with api.submit(wanted):
        await system.reaches(wanted.id, RequestStatus.QUEUED)
        system.queue.lose(1)
        for _ in range(2):
            before = asyncio.all_tasks()
            api.look_after_an_outage()
            await asyncio.wait(asyncio.all_tasks() - before)
        assert caplog.text.count("published again") == 1


async def test_cancelling_is_told_to_every_reader(system: Twins) -> None:
    api, other = an_api(system), an_api(system)
    wanted = stored_request("tokens=1000 delay_ms=5")
    system.worker()
    async with api.submit(wanted) as answer, other.read(wanted) as elsewhere:
        await answer.started()
        assert await system.cancellation.cancel(wanted.id, "by its owner")
        for each in (answer, elsewhere):
            with pytest.raises(ApiError, match="by its owner"):
                await text_of(each)
            assert each.outcome is RequestStatus.CANCELLED
    await system.reaches(wanted.id, RequestStatus.CANCELLED)
    await system.empty()
    assert not await system.cancellation.cancel(wanted.id, "again")


async def test_one_that_waits_can_be_cancelled(system: Twins) -> None:
    api = an_api(system)
    wanted = stored_request()
    async with api.submit(wanted):
        await system.reaches(wanted.id, RequestStatus.QUEUED)
    assert await system.cancellation.cancel(wanted.id, "not needed")
    assert (await api.so_far(wanted)).outcome is RequestStatus.CANCELLED
    await system.empty()


async def test_the_deadline_ends_it_wherever_it_is(system: Twins) -> None:
    api = an_api(system)
    waiting = stored_request(seconds=0.05)
    async with api.submit(waiting) as answer:
        with pytest.raises(ApiError) as told:
            await text_of(answer)
    assert told.value.status == 408
    await system.reaches(waiting.id, RequestStatus.TIMED_OUT)
    await system.empty()


async def test_a_reader_ends_what_its_api_has_left_behind(system: Twins, monkeypatch: pytest.MonkeyPatch) -> None:
    api, other = an_api(system), an_api(system)
    wanted = stored_request(seconds=0.2)
    async with api.submit(wanted):
        await system.reaches(wanted.id, RequestStatus.QUEUED)
    await api.close()
    assert not (await other.so_far(wanted)).done
    monkeypatch.setattr(clock, "now", lambda now=clock.now: now() + 10)
    assert (await other.so_far(wanted)).outcome is RequestStatus.TIMED_OUT
    await system.reaches(wanted.id, RequestStatus.TIMED_OUT)


async def test_a_full_log_refuses_new_answers_and_none_under_way(system: Twins) -> None:
    api = an_api(system)
    wanted = stored_request("tokens=20 delay_ms=5")
    system.worker()
    async with api.submit(wanted) as answer:
        await answer.started()
        system.answers.room = False
        with pytest.raises(AnswerLogFull):
            async with api.submit(stored_request()):
                pass
        assert await text_of(answer) == WHOLE


async def test_an_answer_of_any_length_is_read_late_and_slowly(system: Twins, monkeypatch: pytest.MonkeyPatch) -> None:
    api = an_api(system)
    wanted = stored_request("tokens=20 delay_ms=21")
    system.worker()
    async with api.submit(wanted) as answer:
        assert await text_of(answer) == WHOLE
    await system.reaches(wanted.id, RequestStatus.COMPLETED)
    monkeypatch.setattr(live_answer, "MAX_UNREAD_TOKENS", 3)
    monkeypatch.setattr(stored, "PAGE", 2)
    monkeypatch.setattr(memory, "PAGE", 2)
    assert (await api.so_far(wanted)).outcome is RequestStatus.COMPLETED
    async with api.read(wanted) as slow:
        await slow.started()
        for _ in range(100):
            await asyncio.sleep(0)
        assert not slow.done, "no more is read than the client takes"
        assert await text_of(slow) == WHOLE
    async with api.read(wanted) as left:
        await left.started()


async def test_a_reader_of_an_answer_that_is_deleted_does_not_wait(system: Twins) -> None:
    api, other = an_api(system), an_api(system)
    wanted = stored_request("tokens=20")
    system.worker()
    async with api.submit(wanted) as answer:
        await text_of(answer)
    await system.reaches(wanted.id, RequestStatus.COMPLETED)
    await api.forget(wanted)
    async with other.read(wanted) as late:
        with pytest.raises(ApiError, match="deleted"):
            await text_of(late)
    assert await other.ended_as(wanted) is RequestStatus.COMPLETED


async def test_an_attempt_that_begins_late_writes_nothing_into_a_deleted_answer(system: Twins) -> None:
    api = an_api(system)
    wanted = stored_request("tokens=20")
    async with api.submit(wanted):
        delivery = await system.queue.pull()
        await api.forget(wanted)
    before = await system.answers.read(wanted.id)
    assert [type(decode_frame(frame)) for record in before for frame in record.frames] == [Failed]
    async with asyncio.timeout(30):
        await system.runner().run(delivery)
    assert await system.answers.read(wanted.id) == before
    await api.forget(wanted)
    assert await system.answers.read(wanted.id) == before


async def test_a_reader_of_an_answer_that_expires_does_not_wait(system: Twins) -> None:
    api, other = an_api(system), an_api(system)
    wanted = stored_request("tokens=4 delay_ms=21")
    system.worker()
    async with api.submit(wanted) as answer:
        await text_of(answer)
    await system.reaches(wanted.id, RequestStatus.COMPLETED)
    del system.answers._answers[wanted.id][:2]
    async with other.read(wanted) as late:
        with pytest.raises(ApiError, match="not stored any more"):
            await text_of(late)
    assert (await other.so_far(wanted)).done


async def test_an_attempt_whose_beginning_has_expired_begins_again(system: Twins) -> None:
    api = an_api(system)
    wanted = stored_request("tokens=6 delay_ms=21")
    async with api.submit(wanted) as answer:
        delivery = await system.queue.pull()
        dying = asyncio.create_task(system.runner("w1").run(delivery))
        async with asyncio.timeout(30):
            while len(await system.answers.read(wanted.id)) < 4:  # noqa: ASYNC110 - the worker tells no test
                await asyncio.sleep(0.001)
        dying.cancel()
        del system.answers._answers[wanted.id][:2]
        system.worker("w2")
        system.queue.forget_deliveries()
        await text_of(answer)
    async with api.read(wanted) as late:
        assert await text_of(late) == "t0 t1 t2 t3 t4 t5"


async def test_a_second_admission_after_the_end_does_not_end_again(system: Twins) -> None:
    """Of an api that stood still for longer than the duplicate window, after the answer was removed."""
    api = an_api(system)
    wanted = stored_request("tokens=2")
    runner = system.worker()
    async with api.submit(wanted) as answer:
        await text_of(answer)
    await system.reaches(wanted.id, RequestStatus.COMPLETED)
    await system.empty()
    await system.answers.purge(wanted.id)
    write = system.states.write

    async def write_late(state: RequestState, revision: int) -> int:
        await asyncio.sleep(0.05)
        return await write(state, revision)

    system.states.write = write_late  # type: ignore[method-assign]
    system.queue.lose(1)
    await system.queue.publish(wanted.model_copy(update={"created_at": time.time()}))
    await system.empty()
    assert not runner.running
    frames = [frame for record in await system.answers.read(wanted.id) for frame in record.frames]
    assert not any(frame.startswith(b'{"type":"completed"') for frame in frames)


async def test_the_state_of_a_request_that_waits_is_kept(system: Twins) -> None:
    api = an_api(system, state_ttl_s=0.03)
    wanted = stored_request()
    async with api.submit(wanted) as answer, asyncio.timeout(30):
        await system.reaches(wanted.id, RequestStatus.QUEUED)
        while len(system.states.history) < 4:  # noqa: ASYNC110 - a store tells nobody that it is written
            await asyncio.sleep(0.001)
        system.worker()
        await text_of(answer)
    states = {state.status for state in system.states.history[:4]}
    assert states == {RequestStatus.QUEUED}
    await system.reaches(wanted.id, RequestStatus.COMPLETED)


async def test_a_deleted_answer_leaves_nothing_behind(system: Twins, monkeypatch: pytest.MonkeyPatch) -> None:
    api = an_api(system)
    wanted = stored_request("tokens=20")
    system.worker()
    async with api.submit(wanted) as answer:
        await text_of(answer)
    await system.reaches(wanted.id, RequestStatus.COMPLETED)
    await api.forget(wanted)
    monkeypatch.setattr(clock, "now", lambda now=clock.now: now() + 100)
    assert not (await api.so_far(wanted)).done
    await api.cancel(wanted, "too late")
    assert await system.answers.read(wanted.id) == []


async def test_a_failure_is_an_error_for_every_reader(system: Twins) -> None:
    api = an_api(system)
    wanted = stored_request("tokens=3 fail")
    system.worker()
    async with api.submit(wanted) as answer:
        with pytest.raises(ApiError) as told:
            await text_of(answer)
    assert (told.value.status, told.value.code) == (500, "inference_failed")
    assert (await api.so_far(wanted)).outcome is RequestStatus.FAILED
    assert (await system.reaches(wanted.id, RequestStatus.FAILED)).attempt == 3
