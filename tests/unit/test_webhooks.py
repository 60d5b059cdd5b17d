"""Webhooks on the twins: which ends are announced, and how events reach their receivers."""

import asyncio
import base64
import contextlib
from collections.abc import AsyncIterator

import pytest

from forebay_api.in_flight import overdue
from forebay_api.in_flight.records import key_of
from forebay_api.webhooks import delivery
from forebay_api.webhooks.delivery import Deliverer
from forebay_api.webhooks.endpoints import Endpoints, parse
from forebay_contracts.nats import clock
from forebay_contracts.queueing import transitions
from forebay_contracts.queueing.memory import InMemoryQueue
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import ConfigurationError, QueueUnavailable
from forebay_contracts.wire.event import EVENT_TYPES, Event, EventType, event
from forebay_contracts.wire.request import InferenceRequest
from forebay_contracts.wire.state import RequestStatus
from support.batches import batched
from support.receiver import SECRET, Receiver, receivers, sdk, written
from support.twins import Twins, request, twins

OBJECT = "resp_0b7ed6ce3c9f4a369d336c2f4c1f2a10"


@pytest.fixture
async def system() -> AsyncIterator[Twins]:
    async with twins(max_deliveries=2) as made:
        yield made


def background(orders: str = "", *, notify: bool = True, seconds: float = 30) -> InferenceRequest:
    made = request(orders)
    changes = {
        "reply_to": names.answer_subject(made.id),
        "deadline": made.created_at + seconds,
        "record": key_of("resp", None, OBJECT),
        "notify": notify,
    }
    return made.model_copy(update=changes)


def announced(system: Twins) -> list[tuple[str, str]]:
    return [(one.type, one.object_id) for one in system.states.events.values()]


# --- Which ends are announced ---


@pytest.mark.parametrize(
    ("orders", "max_tokens", "kind"),
    [
        ("tokens=3", None, "response.completed"),
        ("tokens=9", 3, "response.incomplete"),
        ("tokens=3 fail", None, "response.failed"),
    ],
)
async def test_an_end_is_announced_once(system: Twins, orders: str, max_tokens: int | None, kind: str) -> None:
    wanted = background(orders)
    sampling = wanted.sampling.model_copy(update={"max_tokens": max_tokens})
    wanted = wanted.model_copy(update={"sampling": sampling})
    system.worker()
    await system.queue.publish(wanted)
    await system.empty()
    assert announced(system) == [(kind, OBJECT)]


async def test_nobody_is_told_who_did_not_ask(system: Twins) -> None:
    system.worker()
    await system.queue.publish(background("tokens=3", notify=False))
    await system.queue.publish(background("tokens=3 fail", notify=False))
    await system.empty()
    assert not system.states.events


@pytest.mark.parametrize("outcome", [RequestStatus.CANCELLED, RequestStatus.TIMED_OUT])
async def test_who_ends_it_before_its_time_announces_it(system: Twins, outcome: RequestStatus) -> None:
    wanted = background("tokens=3")
    unknown = transitions.queued(wanted, await system.queue.publish(wanted))
    await system.cancellation.end(wanted.id, outcome, "its owner said so", unknown=unknown)
    kind = "response.cancelled" if outcome is RequestStatus.CANCELLED else "response.failed"
    assert announced(system) == [(kind, OBJECT)]


async def test_a_writer_that_dies_before_the_event_is_made_up_for(
    system: Twins, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log has the whole answer, and its worker dies before the event and the state."""
    wanted = background("tokens=9")
    wanted = wanted.model_copy(update={"sampling": wanted.sampling.model_copy(update={"max_tokens": 3})})
    await system.queue.publish(wanted)
    ended, write = asyncio.Event(), system.states.write

    async def die(state: object, revision: int) -> int:
        if revision == 0:
            return await write(state, revision)  # type: ignore[arg-type]
        ended.set()
        return await asyncio.Event().wait()  # type: ignore[return-value]

    with monkeypatch.context() as patch:
        patch.setattr(system.states, "write", die)
        dying = asyncio.create_task(system.runner("w1").run(await system.queue.pull()))
        await ended.wait()
        dying.cancel()
    system.queue.forget_deliveries()
    system.worker("w2")
    await system.empty()
    state = await system.state(wanted.id)
    assert announced(system) == [("response.incomplete", OBJECT)]
    assert state.usage is not None
    assert state.usage.completion_tokens == 3


def test_an_event_is_named_by_its_object_and_kind() -> None:
    one, again = event("batch.completed", "batch_1", 1.5, "alice"), event("batch.completed", "batch_1", 2.5, "alice")
    assert one.id == again.id
    assert one.id.startswith("evt_")
    assert event("batch.failed", "batch_1", 1.5, "alice").id != one.id
    assert event("batch.completed", "batch_1", 1.5, "alice", run="other").id != one.id


async def test_what_nobody_takes_is_announced_though_its_api_is_gone(
    system: Twins, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overdue, "OVERDUE_S", 0.0)
    monkeypatch.setattr(overdue, "LOOK_S", 0.0)
    late, later = [background(seconds=seconds) for seconds in (-1, 0.2)]
    for one in (late, later):
        await system.queue.publish(one)
    looks = 0

    async def waiting() -> AsyncIterator[InferenceRequest]:
        nonlocal looks
        looks += 1
        if looks == 1:
            raise QueueUnavailable("NATS does not answer")
        for one in (late, later):
            yield one

    async with batched(system) as api:
        looking = overdue.Overdue(waiting, api.stored)
        looking.look()
        for one in (late, later):
            await system.reaches(one.id, RequestStatus.TIMED_OUT)
        looking.close()
    assert announced(system) == [("response.failed", OBJECT)] * 2
    assert looks == 3  # one that failed, one at once, and one at the next deadline


# --- The file ---


def test_whom_the_file_names() -> None:
    endpoints = Endpoints(None)
    endpoints.named = parse(
        f'[a]\nurl = "https://a.example/x"\nsecret = "{SECRET}"\nkey = "alice"\nevents = "response.failed"\n'
        f'[b]\nurl = "http://b.example"\nsecret = ["{SECRET}", "{SECRET}"]\n'
    )
    failed, done = event("response.failed", OBJECT, 0, "alice"), event("response.completed", OBJECT, 0, "bob")
    assert (endpoints.of(failed), endpoints.of(done)) == (["a", "b"], ["b"])
    del endpoints.named["b"]
    assert endpoints.wanted("alice", "response")
    assert not endpoints.wanted("alice", "batch")
    assert not endpoints.wanted("bob", "response")


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ('url = "ftp://a.example"', "[a] url: expected http:// or https:// and a host"),
        ('url = "http://[::1"', "[a] url: it is no URL"),
        ('url = "http://xn--/"', "[a] url: it is no URL"),
        ('url = "http://a.example/\\u0000"', "[a] url: it is no URL"),
        ("events = []", "[a] events: "),
        ('key = "Alice"', "[a] key: String should match pattern"),
        ('secret = "whsec_c2hvcnQ="', "[a] secret: expected whsec_ and the base64 of 24 to 64 bytes"),
        ('events = ["response.done"]', "[a] events: Input should be 'response.completed'"),
        ('method = "GET"', "[a] method: Extra inputs are not permitted"),
    ],
)
def test_a_wrong_file_is_refused_and_not_quoted(lines: str, sentence: str) -> None:
    given = {"url": 'url = "http://a.example"', "secret": f'secret = "{SECRET}"'}
    given[lines.split(" ")[0]] = lines
    with pytest.raises(ConfigurationError) as told:
        parse("[a]\n" + "\n".join(given.values()))
    assert sentence in str(told.value)
    assert "c2hvcnQ" not in str(told.value)


def test_a_new_secret_replaces_the_old_one() -> None:
    new = "whsec_" + base64.b64encode(bytes(32)).decode()
    endpoint = parse(f'[a]\nurl = "http://a.example"\nsecret = ["{new}", "{SECRET}"]')["a"]
    made = event("response.completed", OBJECT, 1.0, None)
    headers = endpoint.headers(made.id, int(clock.now()), made.body())
    for secret in (new, SECRET):
        assert sdk().webhooks.unwrap(made.body(), headers, secret=secret).data.id == OBJECT


# --- Delivery ---


class Delivering:
    """A deliverer on the twin of the queue, in which pauses are short."""

    def __init__(self, made: dict[str, Receiver], timeout_s: float = 30) -> None:
        self.queue = InMemoryQueue(max_queue_size=1000, max_concurrent=1000)
        endpoints = Endpoints(None)
        endpoints.named = parse(written(made))
        self.deliverer = Deliverer(endpoints, self.queue, self.publish, timeout_s=timeout_s, longest_pause_s=0.05)

    async def publish(self, made: Event) -> None:
        self.queue.put(made.encode(), {names.HEADER_MSG_ID: f"{made.id}.{made.endpoint}"})

    async def empty(self) -> None:
        async with asyncio.timeout(30):
            while len(self.queue):  # noqa: ASYNC110 - a queue tells nobody that it is empty
                await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def delivering(made: dict[str, Receiver], **options: float) -> AsyncIterator[Delivering]:
    system = Delivering(made, **options)
    running = asyncio.create_task(system.deliverer.run())
    try:
        yield system
    finally:
        running.cancel()
        await asyncio.wait([running])


def some(kind: EventType = "response.completed", number: int = 0) -> Event:
    return event(kind, f"resp_{number:032x}", clock.now(), None)


async def test_a_receiver_gets_what_the_sdk_verifies() -> None:
    async with receivers("a", "b") as made, delivering(made) as system:
        for kind in EVENT_TYPES:
            await system.publish(some(kind))
        for receiver in made.values():
            assert {one.type for one in await receiver.receives(len(EVENT_TYPES))} == set(EVENT_TYPES)
        await system.empty()
        assert all(len(receiver.posts) == len(EVENT_TYPES) for receiver in made.values())


async def test_a_receiver_that_hangs_holds_up_no_other() -> None:
    async with receivers("slow", "good") as made, delivering(made, timeout_s=0.3) as system:
        free = asyncio.Event()
        most = at_once = 0

        async def hang() -> int:
            nonlocal most, at_once
            at_once += 1
            most = max(most, at_once)
            try:
                await free.wait()
            finally:
                at_once -= 1
            return 200

        made["slow"].answer = hang
        count = 3 * delivery.POSTS_AT_ONCE
        for number in range(count):
            await system.publish(some(number=number))
        await made["good"].receives(count)
        assert not made["slow"].taken
        free.set()
        await made["slow"].receives(count)
        await system.empty()
        assert most <= delivery.POSTS_AT_ONCE


async def test_who_is_gone_gets_it_no_more() -> None:
    async with receivers("gone") as made, delivering(made) as system:

        async def gone() -> int:
            return 410

        made["gone"].answer = gone
        await system.publish(some())
        await system.empty()
        assert len(made["gone"].posts) == 1


async def test_whatever_one_receiver_answers_the_others_get_theirs() -> None:
    """Both are on one host, where a client with cookies would send those of the one to the other."""
    heads, wrong = [], [b"", b"\0\xff\r\n\r\n", b"HTTP/1.1 500 no\r\nset-cookie: a=\xff; Path=/\r\n\r\n"]

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        bad = b"POST /bad" in heads[-1] and wrong
        writer.write(wrong.pop() if bad else b"HTTP/1.1 204 ok\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server, delivering({}) as system:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        file = "\n".join(f'[{name}]\nurl = "{url}/{name}"\nsecret = "{SECRET}"' for name in ("bad", "good"))
        system.deliverer._endpoints.named = parse(file)
        for number in range(2):
            await system.publish(some(number=number))
            await system.empty()
    assert not wrong
    assert sum(b"POST /good" in head for head in heads) == 2
    assert not [head for head in heads if b"cookie" in head.lower()]


async def test_an_event_goes_to_no_receiver_that_has_become_anothers() -> None:
    async with receivers("orders") as made, delivering(made) as system:
        now_bobs = parse(written(made, key='"bob"'))
        system.deliverer._endpoints.named = now_bobs
        await system.publish(
            event("response.completed", OBJECT, clock.now(), "alice").model_copy(update={"endpoint": "orders"})
        )
        await system.publish(event("response.completed", OBJECT, clock.now(), "bob", run="bobs"))
        await made["orders"].receives(1)
        assert len(made["orders"].posts) == 1


async def test_why_there_is_no_connection_is_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    async with receivers("plain") as made, delivering(made) as system:
        named = system.deliverer._endpoints.named
        named["plain"] = named["plain"].model_copy(update={"url": made["plain"].url.replace("http", "https")})
        await system.publish(some())
        async with asyncio.timeout(30):
            while "to plain: no connection: [SSL" not in caplog.text:  # noqa: ASYNC110 - a log tells nobody
                await asyncio.sleep(0.005)


def test_an_environment_without_a_client_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/none.pem")
    with pytest.raises(ConfigurationError, match="webhooks cannot be posted"):
        Delivering({})


async def test_an_event_waits_for_a_file_that_names_its_receiver(monkeypatch: pytest.MonkeyPatch) -> None:
    async with receivers("late") as made, delivering({}) as system:
        await system.publish(some())
        while not system.queue.delivered.total() > 2:  # noqa: ASYNC110 - a queue tells nobody that it was asked
            await asyncio.sleep(0.005)
        system.deliverer._endpoints.named = parse(written(made))
        await made["late"].receives(1)
        system.deliverer._endpoints.named = {}
        monkeypatch.setattr(delivery, "UNWANTED_S", 0.02)
        await system.publish(some(number=1))
        await system.empty()


def test_pauses_grow_with_the_age_of_an_event() -> None:
    deliverer = Deliverer(Endpoints(None), InMemoryQueue(), lambda _: asyncio.sleep(0), 10, 3600)
    for age_s, about_s in ((0, 1), (100, 100), (80_000, 3600)):
        pauses = [deliverer._pause_s(age_s) for _ in range(100)]
        assert 0.5 * about_s <= min(pauses) < max(pauses) <= 1.5 * about_s
