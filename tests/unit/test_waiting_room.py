"""The waiting room on the in-memory twins: moving, giving way, fair shares, and what is left by an api that dies."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable

import pytest

from forebay_api.clients.token_limits import TokenLimits
from forebay_contracts.queueing import transitions
from forebay_contracts.queueing.memory import InMemoryStateStore
from forebay_contracts.queueing.protocols import Waiting
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import (
    RequestTimeout,
    WaitingRoomFull,
)
from forebay_contracts.wire.request import InferenceRequest, Tier
from forebay_contracts.wire.state import RequestStatus
from forebay_inference.attempt.endings import End, Ended
from support.engine import simulated_model
from support.twins import MODEL, Twins, request, twins

UNLIMITED = TokenLimits(list, InMemoryStateStore().usage)


@pytest.fixture
async def system() -> AsyncIterator[Twins]:
    async with twins(max_concurrent=2) as made:
        made.mover()
        yield made


def flex(orders: str = "", **fields: object) -> InferenceRequest:
    return request(orders, tier=Tier.FLEX, **fields)


def text(tokens: int) -> str:
    return " ".join(f"t{number}" for number in range(tokens))


async def until(said: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not said():  # noqa: ASYNC110 - what is waited for tells nobody
            await asyncio.sleep(0)


async def test_a_request_that_may_wait_is_served_where_nothing_else_is(system: Twins) -> None:
    system.worker(slots=2)
    wanted = flex("tokens=3")
    assert await system.text(wanted) == text(3)
    await system.empty()
    assert not system.queue.room.waiting
    state = await system.state(wanted.id)
    assert (state.status, state.deferred, state.turn) == (RequestStatus.COMPLETED, None, 0)


async def test_it_waits_in_the_room_while_all_slots_are_taken(system: Twins) -> None:
    system.worker(slots=1)
    async with system.dispatcher.submit(request("tokens=2 delay_ms=100000")) as busy:
        await busy.started()
        wanted = flex()
        async with system.dispatcher.submit(wanted):
            await system.dispatcher.registered(wanted.id)
            state = await system.state(wanted.id)
            assert (state.status, state.sequence, state.deferred) == (RequestStatus.QUEUED, None, 1)
            assert len(system.queue) == 1
        await system.reaches(wanted.id, RequestStatus.CANCELLED)
        await system.dispatcher.close()
        assert not system.queue.room.waiting


@pytest.mark.parametrize("stored", [False, True])
async def test_it_gives_way_and_its_answer_is_exact(system: Twins, stored: bool) -> None:
    runner = system.worker(slots=2)
    logged = {"reply_to": names.answer_subject("s")} if stored else {}
    waits = [flex("tokens=40 delay_ms=3"), flex("tokens=40 delay_ms=3", **({"id": "s"} | logged if stored else {}))]
    live = [asyncio.create_task(system.text(one)) for one in waits if not names.is_logged(one.reply_to)]
    if stored:
        await system.queue.publish(waits[1])
    for one in waits:
        await system.reaches(one.id, RequestStatus.PROCESSING)
    await asyncio.sleep(0.03)
    assert await system.text(request("tokens=2")) == text(2)
    assert await asyncio.gather(*live) == [text(40)] * len(live)
    for one in waits:
        await system.reaches(one.id, RequestStatus.COMPLETED)
    assert sorted([(await system.state(one.id)).turn for one in waits]) == [0, 1]
    assert not runner.running


async def test_the_newest_gives_way_and_nothing_is_computed_twice(system: Twins) -> None:
    runner = system.worker(slots=2)
    long = [flex("tokens=60 delay_ms=3") for _ in range(2)]
    waiting = []
    for one in long:
        waiting.append(asyncio.create_task(system.text(one)))
        await system.reaches(one.id, RequestStatus.PROCESSING)
    assert await system.text(request("tokens=1")) == text(1)
    used = list(system.used)
    assert [(one.request_id, one.tokens > 1) for one in used] == [(long[1].id, True)]
    assert await asyncio.gather(*waiting) == [text(60)] * 2
    await until(lambda: not runner.running)
    made = sum(one.tokens for one in system.used if one.request_id == long[1].id)
    alone = sum(one.tokens for one in system.used if one.request_id == long[0].id)
    assert made == alone


async def test_an_engine_that_cannot_go_on_does_not_give_way(system: Twins) -> None:
    engine = simulated_model()
    engine.can_resume = lambda _: False  # type: ignore[method-assign]
    system.worker(slots=1, engine=engine)
    wanted = flex("tokens=20 delay_ms=3")
    waiting = asyncio.create_task(system.text(wanted))
    await system.reaches(wanted.id, RequestStatus.PROCESSING)
    assert await system.text(request("tokens=1")) == text(1)
    assert await waiting == text(20)
    assert (await system.state(wanted.id)).turn == 0


async def test_one_that_begins_while_others_wait_gives_way_at_once(system: Twins) -> None:
    first = flex("tokens=3 delay_ms=100000")
    async with system.dispatcher.submit(first) as answer:
        (moved,) = system.queue.room.waiting.values()
        await system.queue.room.move(moved)
        quick = asyncio.create_task(system.text(request("tokens=1")))
        await until(lambda: len(system.queue) == 2)
        system.worker(slots=1)
        assert await quick == text(1)
        assert not answer.done
        assert (await system.state(first.id)).turn == 1


async def test_one_worker_passes_on_what_it_cannot_make_way_for(system: Twins) -> None:
    for name in ("w1", "w2"):
        system.worker(name, slots=1)
    long = [flex("tokens=3 delay_ms=100000") for _ in range(2)]
    waiting = [asyncio.create_task(system.text(one)) for one in long]
    for one in long:
        await system.reaches(one.id, RequestStatus.PROCESSING)
    quick = [asyncio.create_task(system.text(request("tokens=2 delay_ms=20"))) for _ in range(2)]
    assert await asyncio.gather(*quick) == [text(2)] * 2
    assert [(await system.state(one.id)).turn for one in long] == [1, 1]
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


async def test_one_that_gave_way_is_removed_when_it_is_cancelled(system: Twins) -> None:
    system.worker(slots=1)
    long = flex("tokens=3 delay_ms=100000")
    waiting = asyncio.create_task(system.text(long))
    await system.reaches(long.id, RequestStatus.PROCESSING)
    async with system.dispatcher.submit(request("tokens=3 delay_ms=100000")) as quick:
        await quick.started()
        (back,) = system.queue.room.waiting
        assert (await system.state(long.id)).deferred == back
        waiting.cancel()
        await system.reaches(long.id, RequestStatus.CANCELLED)
        await until(lambda: not system.queue.room.waiting)


async def test_it_gives_way_to_one_that_is_delivered_again(system: Twins, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forebay_inference.attempt.giving_way.LOOK_AGAIN_S", 0.01)
    quick = asyncio.create_task(system.text(request("tokens=3")))
    lost = await system.queue.pull()  # by a worker that dies
    long = flex("tokens=3 delay_ms=100000")
    async with system.dispatcher.submit(long):
        (moved,) = system.queue.room.waiting.values()
        await system.queue.room.move(moved)
        system.worker(slots=1)
        await system.reaches(long.id, RequestStatus.PROCESSING)
        system.queue.deliver_again(lost.sequence)
        assert await quick == text(3)
        assert (await system.state(long.id)).turn == 1


async def test_it_gives_way_although_the_notice_was_lost(system: Twins, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forebay_inference.attempt.giving_way.LOOK_AGAIN_S", 0.01)
    system.worker(slots=1)
    long = flex("tokens=3 delay_ms=100000")
    waiting = asyncio.create_task(system.text(long))
    await system.reaches(long.id, RequestStatus.PROCESSING)
    await asyncio.sleep(0.01)  # it has looked back
    system.queue.on_admitted.insert(0, lambda _: None)
    assert await system.text(request("tokens=3")) == text(3)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)


async def test_an_api_that_dies_between_the_steps_of_a_move_leaves_nothing_behind(system: Twins) -> None:
    room = system.queue.room
    wanted = flex("tokens=30 delay_ms=3")
    room.dying = True
    system.worker(slots=2)
    async with system.dispatcher.submit(wanted) as answer:
        await answer.started()
        assert len(room.waiting) == 1
        room.dying = False
        system.movers[0].look(MODEL)
        await until(lambda: not room.waiting)
        assert "".join([delta.text async for some in answer.deltas() for delta in some]) == text(30)
    await system.empty()
    assert [state.attempt for state in system.states.history if state.status is RequestStatus.PROCESSING] == [1]


async def test_two_apis_that_move_at_once_move_it_once(system: Twins) -> None:
    system.worker(slots=2)
    system.mover()
    system.queue.room.on_deferred.append(lambda _: system.movers[1].look(MODEL))
    many = [flex(f"tokens={count}") for count in range(1, 9)]
    assert await asyncio.gather(*map(system.text, many)) == [text(count) for count in range(1, 9)]
    await system.empty()
    assert (await system.states.totals())[RequestStatus.COMPLETED] == len(many)
    assert not system.queue.room.waiting


async def test_what_has_ended_is_not_moved(system: Twins) -> None:
    wanted = flex()
    await system.queue.publish(wanted)
    ended = transitions.ended(transitions.queued(wanted, 1), RequestStatus.CANCELLED, stored=False)
    await system.states.write(ended, 0)
    system.worker(slots=1)
    await until(lambda: not system.queue.room.waiting)
    assert not len(system.queue)


async def test_the_room_of_a_key_is_full(system: Twins) -> None:
    for _ in range(100):
        await system.queue.publish(flex(key="a"))
    with pytest.raises(WaitingRoomFull):
        await system.queue.publish(flex(key="a"))
    await system.queue.publish(flex(key="b"))
    # One that gave way always finds a place.
    await system.queue.put_back(flex(key="a"), 1, {})


async def test_those_that_gave_way_go_first(system: Twins) -> None:
    await system.queue.publish(flex(key="a"))
    back = flex(key="a")
    await system.queue.put_back(back, 2, {})
    first = await system.queue.room.first(MODEL, "a")
    assert isinstance(first, Waiting)
    assert names.turn_of(first.headers[names.HEADER_MSG_ID]) == (back.id, 2)


async def test_nobody_is_asked_about_an_empty_room(system: Twins) -> None:
    system.worker(slots=1)
    assert await system.text(flex("tokens=1")) == text(1)
    await until(lambda: not system.movers[0].active)

    async def asked(*_: object) -> int:
        raise AssertionError("an idle slot asks for work that is not there")

    system.queue.room.idle = asked  # type: ignore[method-assign,assignment]
    assert await system.text(request("tokens=1")) == text(1)
    await asyncio.sleep(0.05)  # for the notice of the idle slot, after which nothing happens


async def test_what_waited_before_the_api_began_is_moved_when_a_worker_comes(system: Twins) -> None:
    system.queue.room.on_deferred.clear()
    wanted = flex()
    await system.queue.publish(wanted)
    system.movers[0].look_at_all()  # no worker is there
    system.worker(slots=1)
    await until(lambda: not system.queue.room.waiting)


async def test_what_comes_while_the_model_is_paused_is_moved_later(
    system: Twins, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forebay_api.in_flight.mover.LOOK_AGAIN_S", 0.01)
    system.worker(slots=1)
    assert await system.text(flex("tokens=1")) == text(1)
    await asyncio.sleep(0.05)  # for the notice of the idle slot, after which nobody says it again
    system.queue.max_concurrent = 0
    system.queue.room.on_idle[-1](MODEL, system.used[0])
    await until(lambda: not system.movers[0].active)
    await system.queue.publish(flex())
    system.queue.max_concurrent = 2  # nobody tells of it
    await until(lambda: not system.queue.room.waiting)


async def test_the_deadline_passes_in_the_room(system: Twins) -> None:
    wanted = flex(deadline=time.time() + 0.1)
    with pytest.raises(RequestTimeout):
        await system.text(wanted)
    await system.reaches(wanted.id, RequestStatus.TIMED_OUT)
    await until(lambda: not system.queue.room.waiting)


async def test_what_nats_has_lost_of_the_room_is_published_again(system: Twins) -> None:
    wanted = flex("tokens=3")
    async with system.dispatcher.submit(wanted) as answer:
        system.queue.room.lose(1)
        system.dispatcher.look_after_an_outage()
        await until(lambda: bool(system.queue.room.waiting))
        system.worker(slots=1)
        assert "".join([delta.text async for some in answer.deltas() for delta in some]) == text(3)


async def test_what_nats_has_lost_after_a_move_goes_on_in_the_next_turn(system: Twins) -> None:
    wanted = flex("tokens=40 delay_ms=3")
    first = system.worker("w1", slots=1)
    async with system.dispatcher.submit(wanted) as answer:
        await answer.started()
        (attempt,) = first.running.values()
        system.queue.lose(attempt.delivery.sequence)
        attempt.stop(Ended(End.SUPERSEDED))  # as a worker that is killed
        await until(lambda: not first.running)
        system.dispatcher.look_after_an_outage()
        assert "".join([delta.text async for some in answer.deltas() for delta in some]) == text(40)
    state = await system.reaches(wanted.id, RequestStatus.COMPLETED)
    assert (state.turn, state.attempt) == (1, 2)


async def test_what_is_not_lost_is_not_published_again(system: Twins) -> None:
    system.worker(slots=1)
    wanted = flex("tokens=20 delay_ms=3")
    async with system.dispatcher.submit(wanted) as answer:
        await answer.started()
        await system.reaches(wanted.id, RequestStatus.PROCESSING)
        system.dispatcher.look_after_an_outage()
        assert "".join([delta.text async for some in answer.deltas() for delta in some]) == text(20)
    assert not system.queue.room.waiting
    assert (await system.state(wanted.id)).attempt == 1


async def test_a_key_without_tokens_waits_and_the_others_go_on(system: Twins, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forebay_api.in_flight.mover.LOOK_AGAIN_S", 0.02)
    system.spent.add("alice")
    system.worker(slots=2)
    held, other = flex("tokens=2", key="alice"), flex("tokens=2", key="bob")
    async with system.dispatcher.submit(held) as answer:
        assert await system.text(other) == text(2)
        assert system.queue.room.waiting
        system.spent.clear()  # nobody tells of it
        assert "".join([delta.text async for some in answer.deltas() for delta in some]) == text(2)


@pytest.mark.parametrize("turn", [0, 1])
async def test_an_older_message_does_not_end_what_runs(system: Twins, turn: int) -> None:
    """A redelivered message of an earlier turn is removed, and the attempt of the later turn goes on."""
    wanted = flex("tokens=20 delay_ms=3")
    runner = system.worker(slots=2)
    async with system.dispatcher.submit(wanted) as answer:
        await answer.started()
        runner.running[wanted.id].turn = 1
        system.queue.put(wanted.encode(), {names.HEADER_MSG_ID: names.message_id(wanted.id, turn) + "x"[:turn]})
        assert "".join([delta.text async for some in answer.deltas() for delta in some]) == text(20)
    await system.empty()


async def test_shares_of_two_keys_in_the_room(system: Twins) -> None:
    system.weights = {"b": 3.0}
    system.worker(slots=2)
    many = [flex("tokens=4", key=key) for _ in range(40) for key in "ab"]
    waiting = [asyncio.create_task(system.text(one)) for one in many]
    done: Counter[str | None] = Counter()
    for finished in asyncio.as_completed(waiting):
        await finished
        if sum(done.values()) < 40:
            done = Counter(
                one.key for one, task in zip(many, waiting, strict=True) if task.done() and not task.cancelled()
            )
    assert done["b"] / done["a"] == pytest.approx(3, rel=0.25)
