"""What the seams of the queue promise: the adapter on NATS and the in-memory twin of each pass the same tests."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import NamedTuple

import pytest
from nats.aio.msg import Msg

from forebay_contracts.nats import topology
from forebay_contracts.nats.connection import Connection, connect
from forebay_contracts.queueing import state_store
from forebay_contracts.queueing.admission import JetStreamAdmission
from forebay_contracts.queueing.cancellation import NatsCancelNotices
from forebay_contracts.queueing.deliveries import JetStreamDeliveries
from forebay_contracts.queueing.memory import (
    InMemoryCancelNotices,
    InMemoryQueue,
    InMemoryReplyChannel,
    InMemoryStateStore,
)
from forebay_contracts.queueing.protocols import (
    Admission,
    CancelNotices,
    Deliveries,
    Delivery,
    ReplyChannel,
    StateStore,
)
from forebay_contracts.queueing.reply_channel import CONFIRM_GRACE_S, LiveReplyChannel
from forebay_contracts.queueing.state_store import KeyValueStateStore
from forebay_contracts.settings import Settings, load
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import QueueConflict, QueueFull, QueueUnavailable
from forebay_contracts.wire.frames import Delta, Frame, Resume, ResumedChoice, Started, decode_frame
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
        await asyncio.wait_for(asyncio.create_task(queue.deliveries.pull()), 1)


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
    assert await queue.admission.remove("a", first)
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
        await store.count(RequestStatus.COMPLETED, "before")
    nats_server.kill()
    nats_server.start()
    async with connected(nats_server) as connection:
        queue, store = on_nats(connection), KeyValueStateStore(connection)
        # What was answered for before is recognised after it.
        assert await queue.admission.publish(request("a")) == 1
        await store.count(RequestStatus.COMPLETED, "before")
        assert (await store.totals())[RequestStatus.COMPLETED] == 1
        stored = await store.get("a")
        assert stored is not None
        assert stored.state.status is RequestStatus.QUEUED
        assert id_of(await queue.deliveries.pull()) == "a"
        await queue.deliveries.stop()


async def pulled(connection: Connection) -> None:
    """Wait until a pull waits at the server, which tells nobody of it."""
    async with asyncio.timeout(10):
        while not (await topology.consumers(connection))[0].num_waiting:  # noqa: ASYNC110
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
        delivery = await asyncio.wait_for(waiting, 5)
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
        ]
        for call in calls:
            with pytest.raises(QueueUnavailable):
                await call()  # type: ignore[misc]
        await asyncio.to_thread(nats_server.start)
    async with connected(nats_server) as connection:
        # The failed publish was not sent after all.
        assert await JetStreamAdmission(connection).publish(request("b")) == 1


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
    await asyncio.wait_for(receiver.come.wait(), 5)
    assert receiver.frames == [delta]


async def test_asking_tells_what_the_receiver_has(channel: tuple[ReplyChannel, Receiver]) -> None:
    sender, receiver = channel
    started = Started(attempt=2, worker="w")
    have = await sender.ask(started.encode())
    assert have == Resume(choices=(ResumedChoice(index=0, tokens=(7, 8)),))
    assert receiver.frames == [started]


@pytest.mark.nats
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
    assert await asyncio.wait_for(heard.get(), 5) == ("ask", "a", "why")
    assert await asyncio.wait_for(heard.get(), 5) == ("tell", "a", "because")
