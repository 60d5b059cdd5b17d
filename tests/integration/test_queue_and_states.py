"""What the queue and the state store promise, held against both adapters of each."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable

import pytest

from forebay_contracts.nats import topology
from forebay_contracts.nats.connection import Connection, connect
from forebay_contracts.queueing import states as transitions
from forebay_contracts.queueing.memory import InMemoryQueue
from forebay_contracts.queueing.queue import Delivery, JetStreamQueue, RequestQueue
from forebay_contracts.queueing.states import InMemoryStateStore, KeyValueStateStore, StateStore
from forebay_contracts.settings import Settings, load
from forebay_contracts.wire.errors import QueueConflict, QueueFull, QueueUnavailable
from forebay_contracts.wire.request import CompletionType, InferenceRequest
from forebay_contracts.wire.state import RequestState, RequestStatus
from support.nats import NatsServer

MODEL = "org/model"
MAX_QUEUE_SIZE = 4
MAX_CONCURRENT = 2
ACK_WAIT_S = 30


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


def id_of(delivery: Delivery) -> str:
    return InferenceRequest.model_validate_json(delivery.data).id


@contextlib.asynccontextmanager
async def connected(server: NatsServer, ack_wait: float = ACK_WAIT_S) -> AsyncIterator[Connection]:
    settings = load(
        Settings,
        nats_url=server.url,
        max_queue_size=MAX_QUEUE_SIZE,
        max_concurrent_requests=MAX_CONCURRENT,
        ack_wait=ack_wait,
    )
    connection = await connect(settings, "test")
    try:
        await topology.ensure(connection, settings, MODEL)
        yield connection
    finally:
        await connection.close()


@pytest.fixture(params=["memory", pytest.param("jetstream", marks=pytest.mark.nats)])
async def queue(request: pytest.FixtureRequest) -> AsyncIterator[RequestQueue]:
    if request.param == "memory":
        yield InMemoryQueue(MAX_QUEUE_SIZE, MAX_CONCURRENT)
        return
    async with connected(request.getfixturevalue("nats_server")) as connection:
        made = JetStreamQueue(connection, MODEL)
        yield made
        await made.stop_pulling()


@pytest.fixture(params=["memory", pytest.param("key-value", marks=pytest.mark.nats)])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[StateStore]:
    if request.param == "memory":
        yield InMemoryStateStore()
        return
    async with connected(request.getfixturevalue("nats_server")) as connection:
        yield KeyValueStateStore(connection)


async def test_requests_come_out_in_order_and_end_with_ack(queue: RequestQueue) -> None:
    sequences = [await queue.publish(request(name)) for name in "ab"]
    for name, sequence in zip("ab", sequences, strict=True):
        delivery = await queue.pull()
        assert (id_of(delivery), delivery.attempt, delivery.sequence) == (name, 1, sequence)
        await delivery.in_progress()
        await delivery.ack()
        assert not await queue.remove(sequence)


async def test_a_full_queue_admits_nothing(queue: RequestQueue) -> None:
    for number in range(MAX_QUEUE_SIZE):
        await queue.publish(request(f"r{number}"))
    with pytest.raises(QueueFull):
        await queue.publish(request("one too many"))
    # What is out counts until it is ended.
    delivery = await queue.pull()
    with pytest.raises(QueueFull):
        await queue.publish(request("one too many"))
    await delivery.ack()
    await queue.publish(request("now it fits"))


async def test_the_same_id_again_changes_nothing(queue: RequestQueue) -> None:
    first = await queue.publish(request("a"))
    assert await queue.publish(request("a")) == first
    for number in range(MAX_QUEUE_SIZE - 1):
        await queue.publish(request(f"r{number}"))
    # Recognised on a full queue too: a retry of an accepted request is no new one.
    assert await queue.publish(request("a")) == first
    await (await queue.pull()).ack()
    assert id_of(await queue.pull()) == "r0"


async def test_never_more_out_than_the_limit(queue: RequestQueue) -> None:
    for number in range(MAX_CONCURRENT + 1):
        await queue.publish(request(f"r{number}"))
    out = [await queue.pull() for _ in range(MAX_CONCURRENT)]
    next_one = asyncio.create_task(queue.pull())
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(next_one), 0.3)
    await out[0].ack()
    assert id_of(await next_one) == f"r{MAX_CONCURRENT}"


async def test_what_is_given_back_comes_again(queue: RequestQueue) -> None:
    await queue.publish(request("a"))
    await (await queue.pull()).nak()
    again = await queue.pull()
    assert (id_of(again), again.attempt) == ("a", 2)
    await again.nak(delay_s=0.05)
    once_more = await queue.pull()
    assert (id_of(once_more), once_more.attempt) == ("a", 3)


async def test_what_is_terminated_never_comes_again(queue: RequestQueue) -> None:
    first = await queue.publish(request("a"))
    await queue.publish(request("b"))
    await (await queue.pull()).term()
    delivery = await queue.pull()
    assert id_of(delivery) == "b"
    await delivery.ack()
    assert not await queue.remove(first)


async def test_a_waiting_request_can_be_taken_out(queue: RequestQueue) -> None:
    first = await queue.publish(request("a"))
    await queue.publish(request("b"))
    assert await queue.remove(first)
    assert not await queue.remove(first)
    assert id_of(await queue.pull()) == "b"


async def test_taking_out_what_runs_frees_its_slot(queue: RequestQueue) -> None:
    sequences = [await queue.publish(request(f"r{number}")) for number in range(MAX_CONCURRENT + 1)]
    for _ in range(MAX_CONCURRENT):
        await queue.pull()
    next_one = asyncio.create_task(queue.pull())
    assert await queue.remove(sequences[0])
    assert id_of(await next_one) == f"r{MAX_CONCURRENT}"


async def test_a_pull_waits_for_what_is_to_come(queue: RequestQueue) -> None:
    waiting = asyncio.create_task(queue.pull())
    await asyncio.sleep(0)
    assert not waiting.done()
    await queue.publish(request("a"))
    assert id_of(await waiting) == "a"


async def test_a_cancelled_pull_takes_nothing_with_it(queue: RequestQueue) -> None:
    for _ in range(3):
        waiting = asyncio.create_task(queue.pull())
        await asyncio.sleep(0.01)
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waiting
    await queue.publish(request("a"))
    assert id_of(await queue.pull()) == "a"


async def test_no_pull_survives_the_end(queue: RequestQueue) -> None:
    pulls = [asyncio.create_task(queue.pull()) for _ in range(3)]
    await asyncio.sleep(0.01)
    await queue.stop_pulling()
    results = await asyncio.gather(*pulls, return_exceptions=True)
    assert all(isinstance(result, asyncio.CancelledError) for result in results)
    await queue.publish(request("a"))


async def test_a_delivery_without_a_sign_of_life_goes_to_another(nats_server: NatsServer) -> None:
    async with connected(nats_server, ack_wait=1) as connection:
        queue = JetStreamQueue(connection, MODEL)
        await queue.publish(request("a"))
        await queue.pull()
        again = await queue.pull()
        assert (id_of(again), again.attempt) == ("a", 2)
        await queue.stop_pulling()


async def test_requests_and_states_survive_a_restart_of_nats(nats_server: NatsServer) -> None:
    async with connected(nats_server) as connection:
        await JetStreamQueue(connection).publish(request("a"))
        store = KeyValueStateStore(connection)
        await store.write(state("a"), 0)
        await store.count(RequestStatus.COMPLETED, "before")
    nats_server.kill()
    nats_server.start()
    async with connected(nats_server) as connection:
        queue, store = JetStreamQueue(connection, MODEL), KeyValueStateStore(connection)
        # What was answered for before is recognised after it.
        assert await queue.publish(request("a")) == 1
        await store.count(RequestStatus.COMPLETED, "before")
        assert (await store.totals())[RequestStatus.COMPLETED] == 1
        stored = await store.get("a")
        assert stored is not None
        assert stored.state.status is RequestStatus.QUEUED
        assert id_of(await queue.pull()) == "a"
        await queue.stop_pulling()


async def test_a_pull_outlives_a_restart_of_nats(nats_server: NatsServer) -> None:
    async with connected(nats_server) as connection:
        queue = JetStreamQueue(connection, MODEL)
        waiting = asyncio.create_task(queue.pull())
        await asyncio.sleep(0.05)
        back = asyncio.Event()

        async def reconnected() -> None:
            back.set()

        connection.on_reconnect.append(reconnected)
        await asyncio.to_thread(nats_server.restart)
        await back.wait()
        await queue.publish(request("a"))
        delivery = await asyncio.wait_for(waiting, 5)
        assert id_of(delivery) == "a"
        await queue.stop_pulling()


async def test_without_nats_nothing_is_admitted(nats_server: NatsServer) -> None:
    async with connected(nats_server) as connection:
        queue, store = JetStreamQueue(connection), KeyValueStateStore(connection)
        await asyncio.to_thread(nats_server.stop)
        calls: list[Callable[[], object]] = [
            lambda: queue.publish(request("a")),
            lambda: queue.remove(1),
            lambda: store.get("a"),
            lambda: store.write(state("a"), 0),
            lambda: store.count(RequestStatus.FAILED, "a"),
            store.totals,
        ]
        for call in calls:
            with pytest.raises(QueueUnavailable):
                await call()  # type: ignore[misc]
        await asyncio.to_thread(nats_server.start)
    async with connected(nats_server) as connection:
        # The failed publish was not sent after all.
        assert await JetStreamQueue(connection).publish(request("b")) == 1


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

    await asyncio.gather(*(transitions.change(store, "a", one_more) for _ in range(5)))
    stored = await store.get("a")
    assert stored is not None
    assert stored.state.attempt == 5


async def test_an_end_is_final_and_counted_once(store: StateStore) -> None:
    await store.write(state("a"), 0)
    outcomes = (RequestStatus.COMPLETED, RequestStatus.CANCELLED, RequestStatus.TIMED_OUT)
    ended = await asyncio.gather(*(transitions.finish(store, "a", outcome, outcome.value) for outcome in outcomes))
    (last,) = [state for state in ended if state is not None]
    stored = await store.get("a")
    assert stored is not None
    assert stored.state == last
    assert last.status is outcomes[ended.index(last)]
    assert stored.state.error == stored.state.status.value
    assert stored.state.finished_at is not None
    assert sum((await store.totals()).values()) == 1


async def test_an_unknown_request_is_not_finished(store: StateStore) -> None:
    assert not await transitions.finish(store, "nobody", RequestStatus.FAILED, None)
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


async def test_pulls_end_without_nats_too(nats_server: NatsServer) -> None:
    async with connected(nats_server) as connection:
        queue = JetStreamQueue(connection, MODEL)
        waiting = asyncio.create_task(queue.pull())
        await asyncio.sleep(0.05)
        await asyncio.to_thread(nats_server.stop)
        await asyncio.wait_for(queue.stop_pulling(), 20)
        await asyncio.gather(waiting, return_exceptions=True)
        assert waiting.cancelled()
