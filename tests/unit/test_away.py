"""An api that was away for so long that workers took it for dead: its client and the state agree on the end."""

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from forebay_api.in_flight import dispatcher as module
from forebay_contracts.queueing import transitions
from forebay_contracts.queueing.protocols import Stored
from forebay_contracts.wire.errors import QueueUnavailable, RequestCancelled, RequestTimeout
from forebay_contracts.wire.frames import Completed, Delta, FinishedChoice
from forebay_contracts.wire.request import InferenceRequest
from forebay_contracts.wire.state import RequestState, RequestStatus, Usage
from support.twins import Twins, request, twins

USAGE = Usage(prompt_tokens=2, completion_tokens=1)
WHOLE = Completed(
    attempt=1,
    choices=(FinishedChoice(index=0, finish_reason="stop", tokens=1),),
    usage=USAGE,
    deltas=(Delta(attempt=1, tokens=(0,), text="t0"),),
)


@pytest.fixture
async def system() -> AsyncIterator[Twins]:
    async with twins() as made:
        made.away = True
        yield made


async def begun(system: Twins, wanted: InferenceRequest) -> RequestState:
    """The state of `wanted` while its first attempt runs."""
    state = transitions.claimed(None, wanted, "w1", 1)
    await system.states.write(state, 0)
    return state


async def cancelled(system: Twins, state: RequestState) -> None:
    """What a worker writes that takes the api for dead."""
    stored = await system.states.get(state.id)
    assert stored is not None
    await system.states.write(transitions.ended(state, RequestStatus.CANCELLED, error="gone"), stored.revision)
    await system.states.count(RequestStatus.CANCELLED, state.id)


async def counted(system: Twins, request_id: str, status: RequestStatus) -> None:
    """The state is `status`, and was counted once."""
    await system.dispatcher.close()
    assert (await system.state(request_id)).status is status
    assert {outcome: count for outcome, count in (await system.states.totals()).items() if count} == {status: 1}


async def test_what_was_cancelled_meanwhile_is_not_whole_although_its_last_frame_is_here(system: Twins) -> None:
    wanted = request()
    async with system.dispatcher.submit(wanted) as answer:
        await cancelled(system, await begun(system, wanted))
        answer.receive(WHOLE)
        deltas = answer.deltas()
        assert [delta.text for delta in await anext(deltas)] == ["t0"]  # a stream may show it, and then its true end
        with pytest.raises(RequestCancelled, match="gone"):
            await anext(deltas)
    await counted(system, wanted.id, RequestStatus.CANCELLED)


async def test_what_has_not_ended_is_completed_in_its_state_before_its_client_hears_of_it(system: Twins) -> None:
    wanted = request()
    async with system.dispatcher.submit(wanted) as answer:
        await begun(system, wanted)
        write = system.states.write

        async def writes(state: RequestState, revision: int) -> int:
            assert not answer.done
            return await write(state, revision)

        system.states.write = writes  # type: ignore[method-assign]
        answer.receive(WHOLE)
        assert answer.have(WHOLE).wanted  # its worker asks again
        answer.receive(WHOLE)
        assert [delta.text async for some in answer.deltas() for delta in some] == ["t0"]
        assert answer.have(WHOLE).outcome is RequestStatus.COMPLETED
    await counted(system, wanted.id, RequestStatus.COMPLETED)
    assert (await system.state(wanted.id)).usage == USAGE


async def test_a_worker_that_cancels_in_this_moment_decides(system: Twins) -> None:
    wanted = request()
    async with system.dispatcher.submit(wanted) as answer:
        state = await begun(system, wanted)
        read = system.states.get

        async def overtaken(request_id: str) -> Stored | None:
            system.states.get = read  # type: ignore[method-assign]
            found = await read(request_id)
            await cancelled(system, state)
            return found

        system.states.get = overtaken  # type: ignore[method-assign]
        answer.receive(WHOLE)
        with pytest.raises(RequestCancelled):
            [some async for some in answer.deltas()]
    await counted(system, wanted.id, RequestStatus.CANCELLED)


@pytest.mark.parametrize("fresh", [False, True])
async def test_a_worker_gets_its_answer_through(system: Twins, fresh: bool) -> None:
    # A fresh request may be whole before its claim is stored. Then the worker asks until it is.
    system.worker()
    if not fresh:
        system.connected_for_s = 0
    wanted = request("tokens=3")
    assert await system.text(wanted) == "t0 t1 t2"
    await system.empty()
    await counted(system, wanted.id, RequestStatus.COMPLETED)


async def test_without_nats_it_is_tried_again(system: Twins, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STATE_RETRY_S", 0.0)
    wanted = request()
    async with system.dispatcher.submit(wanted) as answer:
        await cancelled(system, await begun(system, wanted))
        read, failures = system.states.get, iter(range(3))

        async def unavailable(request_id: str) -> Stored | None:
            if next(failures, None) is not None:
                raise QueueUnavailable("NATS does not answer")
            return await read(request_id)

        system.states.get = unavailable  # type: ignore[method-assign]
        answer.receive(WHOLE)
        with pytest.raises(RequestCancelled):
            [some async for some in answer.deltas()]


async def test_while_the_state_decides_neither_a_cancel_nor_the_deadline_does(system: Twins) -> None:
    wanted = request(deadline=time.time() + 0.2)
    async with system.dispatcher.submit(wanted) as answer:
        await begun(system, wanted)
        read, decided = system.states.get, asyncio.Event()

        async def slow(request_id: str) -> Stored | None:
            await decided.wait()
            return await read(request_id)

        system.states.get = slow  # type: ignore[method-assign]
        answer.receive(WHOLE)
        while not answer.held:  # noqa: ASYNC110 - a task that begins tells nobody
            await asyncio.sleep(0)
        cancelling = asyncio.create_task(system.dispatcher.cancel(wanted.id, "by DELETE"))
        await asyncio.sleep(0.25)  # the deadline passes
        assert not answer.done
        decided.set()
        assert [delta.text async for some in answer.deltas() for delta in some] == ["t0"]
        assert not await cancelling
    await counted(system, wanted.id, RequestStatus.COMPLETED)


@pytest.mark.parametrize("meanwhile", [True, False])
async def test_a_deadline_says_what_the_state_says(system: Twins, meanwhile: bool) -> None:
    wanted = request(deadline=time.time() + 0.2)
    async with system.dispatcher.submit(wanted) as answer:
        state = await begun(system, wanted)
        if meanwhile:
            await cancelled(system, state)
        with pytest.raises(RequestCancelled if meanwhile else RequestTimeout):
            await answer.started()
    await counted(system, wanted.id, RequestStatus.CANCELLED if meanwhile else RequestStatus.TIMED_OUT)


async def test_a_state_that_cannot_be_found_out_ends_with_the_deadline(
    system: Twins, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STATE_RETRY_S", 0.001)
    monkeypatch.setattr(module, "STATE_GRACE_S", 0.01)
    wanted = request(deadline=time.time() + 0.2)

    async def unavailable(_: str) -> Stored | None:
        raise QueueUnavailable("NATS does not answer")

    system.states.get = unavailable  # type: ignore[method-assign]
    async with system.dispatcher.submit(wanted) as answer:
        answer.receive(WHOLE)
        with pytest.raises(RequestTimeout):
            [some async for some in answer.deltas()]


async def test_a_client_that_leaves_meanwhile_ends_it(system: Twins) -> None:
    wanted = request()
    async with system.dispatcher.submit(wanted) as answer:
        await begun(system, wanted)
        answer.receive(WHOLE)
    assert answer.outcome is RequestStatus.CANCELLED
    await system.dispatcher.close()
    assert (await system.state(wanted.id)).status.final
