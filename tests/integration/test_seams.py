"""Admission, Deliveries and StateStore: the adapter on NATS and the in-memory twin of each pass the same tests."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import NamedTuple

import pytest

from forebay_contracts.nats.connection import Connection
from forebay_contracts.nats.consumers import consumers
from forebay_contracts.queueing import state_store, transitions
from forebay_contracts.queueing.admission import JetStreamAdmission
from forebay_contracts.queueing.deliveries import JetStreamDeliveries
from forebay_contracts.queueing.memory import (
    InMemoryQueue,
    InMemoryStateStore,
)
from forebay_contracts.queueing.protocols import (
    Admission,
    Deliveries,
    Delivery,
    StateStore,
)
from forebay_contracts.queueing.state_store import KeyValueStateStore
from forebay_contracts.queueing.usage import UsageRow, total
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import QueueConflict, QueueFull, QueueUnavailable
from forebay_contracts.wire.event import Event, event_of
from forebay_contracts.wire.request import CompletionType, InferenceRequest
from forebay_contracts.wire.state import RequestState, RequestStatus, Usage
from support.nats import NatsServer
from support.seams import MAX_CONCURRENT, MAX_QUEUE_SIZE, MODEL, connected


def request(request_id: str) -> InferenceRequest:
    now = time.time()
    return InferenceRequest(
        id=request_id,
        completion_type=CompletionType.CHAT,
        model=MODEL,
        created_at=now,
        deadline=now + 60,
        reply_to="inference.replies.a.b",
    )


def state(request_id: str, status: RequestStatus = RequestStatus.QUEUED) -> RequestState:
    return RequestState(
        id=request_id,
        status=status,
        completion_type="chat",
        timestamp=1.0,
        model=MODEL,
        queued_at=1.0,
        deadline=time.time() + 60,
    )


DAY = "2026-11-30"


def used(request_id: str, key: str | None = "alice", model: str = MODEL) -> RequestState:
    """A request that waited 0.25 s and ended on DAY."""
    at = datetime(2026, 11, 30, 23, 59, 59, tzinfo=UTC).timestamp()
    usage = Usage(prompt_tokens=12, cached_tokens=8, completion_tokens=5)
    times = {"queued_at": at - 9, "started_at": at - 8.75, "finished_at": at}
    ended = {"status": RequestStatus.COMPLETED, "key": key, "model": model, "usage": usage}
    return state(request_id).model_copy(update=times | ended)


def id_of(delivery: Delivery) -> str:
    return InferenceRequest.model_validate_json(delivery.data).id


class Queue(NamedTuple):
    """Both ends of one queue."""

    admission: Admission
    deliveries: Deliveries


def on_nats(connection: Connection) -> Queue:
    return Queue(JetStreamAdmission(connection), JetStreamDeliveries(connection, MODEL))


@pytest.fixture(params=["memory", pytest.param("jetstream", marks=pytest.mark.nats)])
async def queue(request: pytest.FixtureRequest) -> AsyncIterator[Queue]:
    if request.param == "memory":
        both = InMemoryQueue(MAX_QUEUE_SIZE, MAX_CONCURRENT)
        yield Queue(both, both)
        return
    async with connected(request.getfixturevalue("nats_server")) as connection:
        made = on_nats(connection)
        yield made
        await made.deliveries.stop()


@pytest.fixture(params=["memory", pytest.param("key-value", marks=pytest.mark.nats)])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[StateStore]:
    if request.param == "memory":
        yield InMemoryStateStore()
        return
    async with connected(request.getfixturevalue("nats_server")) as connection:
        yield KeyValueStateStore(connection)


async def test_requests_come_out_in_order_and_end_with_ack(queue: Queue) -> None:
    sequences = [await queue.admission.publish(request(name)) for name in "ab"]
    for name, sequence in zip("ab", sequences, strict=True):
        delivery = await queue.deliveries.pull()
        assert (id_of(delivery), delivery.num_delivered, delivery.sequence) == (name, 1, sequence)
        await delivery.in_progress()
        await delivery.ack()
        assert not await queue.admission.remove(name, sequence)


async def test_a_full_queue_admits_nothing(queue: Queue) -> None:
    for number in range(MAX_QUEUE_SIZE):
        await queue.admission.publish(request(f"r{number}"))
    with pytest.raises(QueueFull):
        await queue.admission.publish(request("one too many"))
    # What is out counts until it is ended.
    delivery = await queue.deliveries.pull()
    with pytest.raises(QueueFull):
        await queue.admission.publish(request("one too many"))
    await delivery.ack()
    await queue.admission.publish(request("now it fits"))


async def test_a_pull_after_stop_is_cancelled(queue: Queue) -> None:
    # A slot that has just begun when its worker is told to end would wait until the drain time has passed.
    await queue.deliveries.stop()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(asyncio.create_task(queue.deliveries.pull()), 30)


async def test_the_same_id_again_changes_nothing(queue: Queue) -> None:
    first = await queue.admission.publish(request("a"))
    assert await queue.admission.publish(request("a")) == first
    for number in range(MAX_QUEUE_SIZE - 1):
        await queue.admission.publish(request(f"r{number}"))
    # Recognised on a full queue too: a retry of an accepted request is no new one.
    assert await queue.admission.publish(request("a")) == first
    await (await queue.deliveries.pull()).ack()
    assert id_of(await queue.deliveries.pull()) == "r0"


async def test_never_more_out_than_the_limit(queue: Queue) -> None:
    for number in range(MAX_CONCURRENT + 1):
        await queue.admission.publish(request(f"r{number}"))
    out = [await queue.deliveries.pull() for _ in range(MAX_CONCURRENT)]
    next_one = asyncio.create_task(queue.deliveries.pull())
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(next_one), 0.3)
    await out[0].ack()
    assert id_of(await next_one) == f"r{MAX_CONCURRENT}"


async def test_what_is_given_back_comes_again(queue: Queue) -> None:
    await queue.admission.publish(request("a"))
    await (await queue.deliveries.pull()).nak()
    again = await queue.deliveries.pull()
    assert (id_of(again), again.num_delivered) == ("a", 2)
    await again.nak(delay_s=0.05)
    once_more = await queue.deliveries.pull()
    assert (id_of(once_more), once_more.num_delivered) == ("a", 3)


async def test_what_is_terminated_never_comes_again(queue: Queue) -> None:
    first = await queue.admission.publish(request("a"))
    await queue.admission.publish(request("b"))
    await (await queue.deliveries.pull()).term()
    delivery = await queue.deliveries.pull()
    assert id_of(delivery) == "b"
    await delivery.ack()
    assert not await queue.admission.remove("a", first)


async def test_a_waiting_request_can_be_taken_out(queue: Queue) -> None:
    first = await queue.admission.publish(request("a"))
    await queue.admission.publish(request("b"))
    assert await queue.admission.holds("a", first)
    assert not await queue.admission.holds("b", first)
    assert await queue.admission.remove("a", first)
    assert not await queue.admission.holds("a", first)
    assert not await queue.admission.remove("a", first)
    assert id_of(await queue.deliveries.pull()) == "b"


async def test_taking_out_what_runs_frees_its_slot(queue: Queue) -> None:
    sequences = [await queue.admission.publish(request(f"r{number}")) for number in range(MAX_CONCURRENT + 1)]
    for _ in range(MAX_CONCURRENT):
        await queue.deliveries.pull()
    next_one = asyncio.create_task(queue.deliveries.pull())
    assert await queue.admission.remove("r0", sequences[0])
    assert id_of(await next_one) == f"r{MAX_CONCURRENT}"


async def test_a_pull_waits_for_what_is_to_come(queue: Queue) -> None:
    waiting = asyncio.create_task(queue.deliveries.pull())
    await asyncio.sleep(0)
    assert not waiting.done()
    await queue.admission.publish(request("a"))
    assert id_of(await waiting) == "a"


async def test_a_cancelled_pull_takes_nothing_with_it(queue: Queue) -> None:
    for _ in range(3):
        waiting = asyncio.create_task(queue.deliveries.pull())
        await asyncio.sleep(0.01)
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waiting
    await queue.admission.publish(request("a"))
    assert id_of(await queue.deliveries.pull()) == "a"


async def test_no_pull_survives_the_end(queue: Queue) -> None:
    pulls = [asyncio.create_task(queue.deliveries.pull()) for _ in range(3)]
    await asyncio.sleep(0.01)
    await queue.deliveries.stop()
    results = await asyncio.gather(*pulls, return_exceptions=True)
    assert all(isinstance(result, asyncio.CancelledError) for result in results)
    await queue.admission.publish(request("a"))


async def test_a_delivery_without_a_sign_of_life_goes_to_another(nats_server: NatsServer) -> None:
    async with connected(nats_server, ack_wait=1) as connection:
        queue = on_nats(connection)
        await queue.admission.publish(request("a"))
        await queue.deliveries.pull()
        again = await queue.deliveries.pull()
        assert (id_of(again), again.num_delivered) == ("a", 2)
        await queue.deliveries.stop()


async def test_requests_and_states_survive_a_restart_of_nats(nats_server: NatsServer) -> None:
    async with connected(nats_server) as connection:
        await JetStreamAdmission(connection).publish(request("a"))
        store = KeyValueStateStore(connection)
        await store.write(state("a"), 0)
        await store.count(RequestStatus.COMPLETED, "before", used("before"))
    nats_server.kill()
    nats_server.start()
    async with connected(nats_server) as connection:
        queue, store = on_nats(connection), KeyValueStateStore(connection)
        # What was answered for before is recognised after it.
        assert await queue.admission.publish(request("a")) == 1
        await store.count(RequestStatus.COMPLETED, "before", used("before"))
        assert (await store.totals())[RequestStatus.COMPLETED] == 1
        assert total(await store.usage([DAY])).requests == 1
        stored = await store.get("a")
        assert stored is not None
        assert stored.state.status is RequestStatus.QUEUED
        assert id_of(await queue.deliveries.pull()) == "a"
        await queue.deliveries.stop()


async def pulled(connection: Connection) -> None:
    """Wait until a pull waits at the server, which tells nobody of it."""
    async with asyncio.timeout(30):
        while not (await consumers(connection))[0].num_waiting:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_a_pull_outlives_a_restart_of_nats(nats_server: NatsServer) -> None:
    async with connected(nats_server) as connection:
        queue = on_nats(connection)
        waiting = asyncio.create_task(queue.deliveries.pull())
        await pulled(connection)
        back = asyncio.Event()

        async def reconnected() -> None:
            back.set()

        connection.on_reconnect.append(reconnected)
        await asyncio.to_thread(nats_server.restart)
        await back.wait()
        await queue.admission.publish(request("a"))
        delivery = await asyncio.wait_for(waiting, 30)
        assert id_of(delivery) == "a"
        await queue.deliveries.stop()


async def test_without_nats_nothing_is_admitted(nats_server: NatsServer) -> None:
    async with connected(nats_server) as connection:
        queue, store = on_nats(connection), KeyValueStateStore(connection)
        await asyncio.to_thread(nats_server.stop)
        calls: list[Callable[[], object]] = [
            lambda: queue.admission.publish(request("a")),
            lambda: queue.admission.remove("a", 1),
            lambda: store.get("a"),
            lambda: store.write(state("a"), 0),
            lambda: store.count(RequestStatus.FAILED, "a"),
            store.totals,
            lambda: store.usage([DAY]),
        ]
        for call in calls:
            with pytest.raises(QueueUnavailable):
                await call()  # type: ignore[misc]
        await asyncio.to_thread(nats_server.start)
    async with connected(nats_server) as connection:
        # The failed publish was not sent after all.
        assert await JetStreamAdmission(connection).publish(request("b")) == 1


async def test_an_end_is_announced_once_before_it_is_final(nats_server: NatsServer) -> None:
    async with connected(nats_server) as connection:
        store = KeyValueStateStore(connection)
        running = state("a", RequestStatus.PROCESSING).model_copy(update={"notify": "resp_a", "key": "alice"})
        revision = await store.write(running, 0)
        ended = transitions.ended(running, RequestStatus.COMPLETED)
        with pytest.raises(QueueConflict):
            await store.write(ended, 0)
        await store.write(ended, revision)
        events = JetStreamDeliveries(connection, names.WEBHOOKS_CONSUMER, names.WEBHOOKS)
        delivery = await events.pull()
        assert Event.model_validate_json(delivery.data) == event_of(ended)
        await delivery.ack()
        info = await connection.jetstream.stream_info(names.WEBHOOKS)
        assert (info.state.messages, info.state.last_seq) == (0, 1)
        await events.stop()


async def test_an_unknown_state_is_none(store: StateStore) -> None:
    assert await store.get("nobody") is None


async def test_a_state_is_read_as_it_was_written(store: StateStore) -> None:
    revision = await store.write(state("a"), 0)
    stored = await store.get("a")
    assert stored is not None
    assert (stored.state, stored.revision) == (
        state("a").model_copy(update={"deadline": stored.state.deadline}),
        revision,
    )


async def test_only_the_last_revision_can_be_changed(store: StateStore) -> None:
    first = await store.write(state("a"), 0)
    with pytest.raises(QueueConflict):
        await store.write(state("a"), 0)
    await store.write(state("a", RequestStatus.PROCESSING), first)
    with pytest.raises(QueueConflict):
        await store.write(state("a", RequestStatus.COMPLETED), first)
    # Another key's writes do not matter.
    await store.write(state("b"), 0)


async def test_of_two_that_change_at_once_both_are_heard(store: StateStore) -> None:
    await store.write(state("a"), 0)

    def one_more(present: RequestState | None) -> RequestState | None:
        assert present is not None
        return present.model_copy(update={"attempt": present.attempt + 1})

    await asyncio.gather(*(state_store.change(store, "a", one_more) for _ in range(5)))
    stored = await store.get("a")
    assert stored is not None
    assert stored.state.attempt == 5


async def test_an_end_is_final_and_counted_once(store: StateStore) -> None:
    await store.write(state("a"), 0)
    outcomes = (RequestStatus.FAILED, RequestStatus.CANCELLED, RequestStatus.TIMED_OUT)
    ended = await asyncio.gather(*(state_store.end(store, "a", outcome, outcome.value) for outcome in outcomes))
    (last,) = [state for state in ended if state is not None]
    stored = await store.get("a")
    assert stored is not None
    assert stored.state == last
    assert last.status is outcomes[ended.index(last)]
    assert stored.state.error == stored.state.status.value
    assert stored.state.finished_at is not None
    assert sum((await store.totals()).values()) == 1


async def test_an_unknown_request_is_not_finished(store: StateStore) -> None:
    assert not await state_store.end(store, "nobody", RequestStatus.FAILED, None)
    assert sum((await store.totals()).values()) == 0


async def test_totals_count_each_request_once(store: StateStore) -> None:
    assert set((await store.totals()).values()) == {0}
    for request_id in ("a", "b", "a"):
        await store.count(RequestStatus.COMPLETED, request_id)
    await store.count(RequestStatus.TIMED_OUT, "c")
    assert await store.totals() == {
        RequestStatus.COMPLETED: 2,
        RequestStatus.FAILED: 0,
        RequestStatus.TIMED_OUT: 1,
        RequestStatus.CANCELLED: 0,
    }


async def test_usage_counts_each_request_once(store: StateStore) -> None:
    assert await store.usage([DAY]) == []
    # The writer of an end counts it, and so does whoever finds that end.
    for state in (used("a"), used("b", key="bob"), used("c", model="org/m-1.5"), used("a"), used("d")):
        await store.count(state.status, state.id, state)
    await store.count(RequestStatus.FAILED, "of another version")
    twice = UsageRow(
        day=DAY,
        model=MODEL,
        key="alice",
        requests=2,
        prompt_tokens=24,
        cached_tokens=16,
        completion_tokens=10,
        queue_seconds=0.5,
    )
    once = {"requests": 1, "prompt_tokens": 12, "cached_tokens": 8, "completion_tokens": 5, "queue_seconds": 0.25}
    others = [twice.model_copy(update=once | name) for name in ({"key": "bob"}, {"model": "org/m-1.5"})]
    assert sorted(await store.usage([DAY, "2001-01-01"]), key=str) == sorted([twice, *others], key=str)
    assert await store.usage([DAY], ["bob", None]) == others[:1]
    assert await store.usage(["2001-01-01"]) == []


async def test_usage_without_a_key_is_added_up_and_counted_at_the_end_too(nats_server: NatsServer) -> None:
    async with connected(nats_server) as connection:
        store = KeyValueStateStore(connection)
        for state in (used("a", key=None), used("b", key=None), used("a", key=None)):
            await store.count(state.status, state.id, state)
        assert await store.usage([DAY]) == []
    async with connected(nats_server) as connection:
        (found,) = await KeyValueStateStore(connection).usage([DAY])
        assert (found.key, found.requests, found.completion_tokens) == (None, 2, 10)


async def test_pulls_end_without_nats_too(nats_server: NatsServer) -> None:
    async with connected(nats_server) as connection:
        queue = on_nats(connection)
        waiting = asyncio.create_task(queue.deliveries.pull())
        await pulled(connection)
        await asyncio.to_thread(nats_server.stop)
        await asyncio.wait_for(queue.deliveries.stop(), 20)
        await asyncio.gather(waiting, return_exceptions=True)
        assert waiting.cancelled()


async def test_a_message_is_taken_out_by_its_own_request_alone(queue: Queue) -> None:
    # A store that lost its last records gives their sequences to other requests.
    sequence = await queue.admission.publish(request("a"))
    assert not await queue.admission.remove("somebody-else", sequence)
    assert id_of(await queue.deliveries.pull()) == "a"
