"""Races and errors at the edges of an attempt: nothing is lost, nothing waits for ever, no error ends a worker."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator

import pytest

from forebay_api.in_flight.answer import Cancelled
from forebay_api.in_flight.live_answer import RESEND_RETRY_S, LiveAnswer
from forebay_contracts.queueing import state_store, transitions
from forebay_contracts.queueing.memory import InMemoryDelivery
from forebay_contracts.queueing.protocols import Stored
from forebay_contracts.telemetry.metrics import REGISTRY
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import InferenceFailed, QueueConflict, QueueUnavailable, StateUnreadable
from forebay_contracts.wire.frames import Delta, Failed, Started, decode_frame
from forebay_contracts.wire.request import InferenceRequest
from forebay_contracts.wire.state import RequestState, RequestStatus
from forebay_inference.attempt import ownership
from forebay_inference.attempt.endings import End, Ended
from forebay_inference.engine.events import Accepted, Event, Finished, ResumeTokens, Tokens
from forebay_inference.worker_metrics import WorkerMetrics
from support.twins import Twins, request, twins


@pytest.fixture
async def system() -> AsyncIterator[Twins]:
    async with twins() as made:
        yield made


async def pulled(system: Twins) -> InMemoryDelivery:
    delivery = await system.queue.pull()
    assert isinstance(delivery, InMemoryDelivery)
    return delivery


async def unreadable(request_id: str) -> Stored | None:
    raise StateUnreadable(f"the state of request {request_id} cannot be read")


async def failed_in_the_counter(system: Twins) -> int:
    return (await system.states.totals())[RequestStatus.FAILED]


async def test_an_unreadable_message_with_an_unreadable_state_leaves_the_queue(system: Twins) -> None:
    # Both come from a newer api, as during an upgrade. Each worker that pulled it would end, one after another.
    wanted = request()
    system.queue.put(b"{", {names.HEADER_MSG_ID: wanted.id, names.HEADER_REPLY_TO: wanted.reply_to})
    system.states.get = unreadable  # type: ignore[method-assign]
    delivery = await pulled(system)
    await system.runner().run(delivery)
    assert delivery.verbs == ["term"]
    assert await failed_in_the_counter(system) == 1


async def test_an_unreadable_message_ends_the_log_of_its_answer(system: Twins) -> None:
    wanted = request()
    headers = {names.HEADER_MSG_ID: wanted.id, names.HEADER_REPLY_TO: names.answer_subject(wanted.id)}
    system.queue.put(b"{", headers)
    delivery = await pulled(system)
    await system.runner().run(delivery)
    (record,) = await system.answers.read(wanted.id)
    assert isinstance(decode_frame(record.frames[-1]), Failed)
    assert delivery.verbs == ["term"]


async def test_a_newer_version_that_took_the_request_over_keeps_it(system: Twins) -> None:
    # Its state is of a version that this worker cannot read. Only another attempt can have written it.
    wanted = request("tokens=2 delay_ms=20")
    async with system.dispatcher.submit(wanted) as answer:
        delivery = await pulled(system)
        work = asyncio.create_task(system.runner("old").run(delivery))
        await answer.started()
        stored = await system.states.get(wanted.id)
        assert stored is not None
        await system.states.write(transitions.claimed(stored.state, wanted, "new", 1), stored.revision)
        system.states.get = unreadable  # type: ignore[method-assign]
        await work
        assert delivery.verbs == []
        assert await failed_in_the_counter(system) == 0


async def test_a_redelivery_beside_a_state_of_a_newer_version_does_not_end_the_worker(system: Twins) -> None:
    wanted = request("tokens=2 delay_ms=10000")
    async with system.dispatcher.submit(wanted) as answer:
        runner = system.runner()
        first = asyncio.create_task(runner.run(await pulled(system)))
        await answer.started()
        system.states.get = unreadable  # type: ignore[method-assign]
        system.queue.forget_deliveries()
        await runner.run(await pulled(system))
        await first
        assert not runner.running


async def test_a_state_that_never_stops_changing_does_not_end_the_worker(
    system: Twins, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As where a state is read from a replica that lags behind for long.
    async def conflict(state: RequestState, _: int) -> int:
        raise QueueConflict(f"request {state.id}: its state was changed by somebody else")

    monkeypatch.setattr(ownership, "STORE_PATIENCE_S", 0)
    monkeypatch.setattr(state_store, "CONFLICT_PAUSE_MAX_S", 0)
    wanted = request("tokens=1")
    async with system.dispatcher.submit(wanted):
        delivery = await pulled(system)
        system.states.write = conflict  # type: ignore[method-assign]
        await system.runner().run(delivery)
        assert delivery.verbs == []


async def unencodable(_: InferenceRequest, __: ResumeTokens) -> AsyncGenerator[Event, None]:
    """An answer that ends with a tool call that JSON cannot carry: half of a surrogate pair."""
    yield Accepted(1)
    yield Tokens(0, (1,), "t")
    yield Tokens(0, (), "", tool_calls=({"function": {"arguments": "\ud800"}},))
    yield Finished(0, "tool_calls")


async def test_an_answer_that_cannot_be_encoded_is_a_fault_of_the_attempt(system: Twins) -> None:
    wanted = request()
    async with system.dispatcher.submit(wanted):
        runner, delivery = system.runner(), await pulled(system)
        runner._engine.generate = unencodable  # type: ignore[method-assign]
        await runner.run(delivery)
        assert delivery.verbs == ["nak"]
        assert "PydanticSerializationError" in ((await system.state(wanted.id)).fault or "")


async def test_a_stop_while_the_claim_finds_an_earlier_attempt_is_not_lost(system: Twins) -> None:
    # The worker drains in the moment in which its first attempt turns out to be the second.
    wanted = request("tokens=2 delay_ms=100000")
    async with system.dispatcher.submit(wanted):
        runner, delivery = system.runner(), await pulled(system)
        await system.states.write(transitions.claimed(None, wanted, "w0", 1), 0)
        claimed = asyncio.Event()
        write = system.states.write

        async def slow_write(state: RequestState, revision: int) -> int:
            if revision:
                claimed.set()
                await asyncio.sleep(0.01)
            return await write(state, revision)

        system.states.write = slow_write  # type: ignore[method-assign]
        work = asyncio.create_task(runner.run(delivery))
        await claimed.wait()
        runner.running[wanted.id].stop(Ended(End.HANDED_OVER))
        async with asyncio.timeout(30):
            await work
        assert delivery.verbs == ["nak"]
        assert (await system.state(wanted.id)).status is RequestStatus.QUEUED


async def test_an_attempt_that_goes_on_under_its_true_number_counts_each_token_once(system: Twins) -> None:
    # Two tokens are out before the claim finds an earlier attempt.
    wanted = request("tokens=5 delay_ms=10", model="counted once")
    async with system.dispatcher.submit(wanted) as answer:
        runner, delivery = system.runner(), await pulled(system)
        runner._metrics = WorkerMetrics(wanted.model)
        await system.states.write(transitions.claimed(None, wanted, "w0", 1), 0)
        two_are_out, write = asyncio.Event(), system.states.write

        async def slow_write(state: RequestState, revision: int) -> int:
            if not revision:
                await two_are_out.wait()
            return await write(state, revision)

        system.states.write = slow_write  # type: ignore[method-assign]
        work = asyncio.create_task(runner.run(delivery))
        deltas = [delta async for some in _until(answer.deltas(), two_are_out) for delta in some]
        await work
        assert [token for delta in deltas for token in delta.tokens] == [0, 1, 2, 3, 4]
        assert (await system.state(wanted.id)).attempt == 2
    count = REGISTRY.get_sample_value
    assert count("forebay_tokens_total", {"model": wanted.model, "direction": "output"}) == 5
    assert count("forebay_time_to_first_token_seconds_count", {"model": wanted.model}) == 1


async def _until(
    batches: AsyncIterator[list[Delta]], reached: asyncio.Event, tokens: int = 2
) -> AsyncIterator[list[Delta]]:
    """All of `batches`; sets `reached` once that many tokens have come."""
    async for some in batches:
        tokens -= sum(len(delta.tokens) for delta in some)
        if tokens <= 0:
            reached.set()
        yield some


async def test_a_client_that_still_waits_hears_of_an_end_before_whatever_its_last_attempt(system: Twins) -> None:
    wanted = request()
    async with system.dispatcher.submit(wanted) as answer:
        second = transitions.claimed(transitions.claimed(None, wanted, "w0", 1), wanted, "w0", 1)
        await system.states.write(transitions.ended(second, RequestStatus.FAILED, stored=True, error="spent"), 0)
        answer.receive(Started(attempt=2, worker="w0"))
        await system.runner().run(await pulled(system))
        assert answer.error is not None
        assert answer.error.code == InferenceFailed.code


async def test_a_delivery_that_comes_while_its_attempt_ends_is_ended_too(system: Twins) -> None:
    wanted = request("tokens=2 delay_ms=10")
    async with system.dispatcher.submit(wanted) as answer:
        runner = system.runner()
        work = asyncio.create_task(runner.run(await pulled(system)))
        await answer.started()
        read = system.states.get

        async def slow_get(request_id: str) -> Stored | None:
            await work
            return await read(request_id)

        system.states.get = slow_get  # type: ignore[method-assign]
        system.queue.forget_deliveries()
        again = await pulled(system)
        ending = asyncio.create_task(runner.run(again))
        await work
        system.states.get = read  # type: ignore[method-assign]
        await ending
        assert again.verbs == ["term"]


async def test_a_worker_is_told_although_the_message_cannot_be_taken_out(system: Twins) -> None:
    wanted = request()
    sequence = await system.queue.publish(wanted)
    await system.states.write(transitions.queued(wanted, sequence), 0)

    async def unavailable(*_: object) -> bool:
        raise QueueUnavailable("the queue cannot be reached")

    system.queue.remove = unavailable  # type: ignore[method-assign]
    with pytest.raises(QueueUnavailable):
        await system.cancellation.end(wanted.id, RequestStatus.CANCELLED, "why")
    assert system.notices.told == [wanted.id]


async def test_what_is_cancelled_while_it_is_published_does_not_stay_in_the_queue(system: Twins) -> None:
    wanted = request()
    publish = system.queue.publish

    async def slow_publish(request: InferenceRequest) -> int:
        await system.dispatcher.cancel(request.id, "at once")
        return await publish(request)

    system.queue.publish = slow_publish  # type: ignore[method-assign]
    async with system.dispatcher.submit(wanted) as answer:
        with pytest.raises(Cancelled):
            await answer.started()
    await system.dispatcher.close()
    assert len(system.queue) == 0


def test_a_lost_resend_is_asked_for_again() -> None:
    answer = LiveAnswer(request(), lambda _: None)
    answer.receive(Delta(attempt=1, offset=1, tokens=(1,), text="b"))
    wanted = answer.missing(now=0)
    assert wanted is not None
    assert answer.missing(now=RESEND_RETRY_S / 2) is None
    assert answer.missing(now=RESEND_RETRY_S) == wanted
    answer.receive(Delta(attempt=1, tokens=(0,), text="a"))
    assert answer.missing(now=RESEND_RETRY_S) is None
    answer.receive(Delta(attempt=1, offset=2, tokens=(2,), text="c"))
    assert answer.missing(now=RESEND_RETRY_S) is not None
