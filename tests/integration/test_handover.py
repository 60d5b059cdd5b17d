"""The worker that has a conversation in its cache gets the next request of it, on a real nats-server."""

import asyncio
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Any, NamedTuple

import pytest

from forebay_contracts.nats.connection import Connection
from forebay_contracts.queueing.admission import JetStreamAdmission
from forebay_contracts.queueing.deliveries import JetStreamDeliveries
from forebay_contracts.wire import names
from forebay_contracts.wire.request import InferenceRequest
from forebay_inference import handover
from forebay_inference.handover import Handover, keys
from support import conversations
from support.conversations import LONG
from support.nats import NatsServer, flushed
from support.seams import MODEL, connected

chat = partial(conversations.chat, model=MODEL)
FIRST = chat(LONG)


class Worker(NamedTuple):
    """A worker without an engine."""

    connection: Connection
    deliveries: JetStreamDeliveries
    handover: Handover


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is too late on a busy machine."""
    monkeypatch.setattr(handover, "PATIENCE_S", 30)
    monkeypatch.setattr(handover, "RESERVED_S", 30)


@pytest.fixture
async def pair(nats_server: NatsServer) -> AsyncIterator[tuple[JetStreamAdmission, Worker, Worker]]:
    """The entry of the queue and two workers; the first has the conversation that begins with FIRST."""

    def worker(connection: Connection, name: str) -> Worker:
        deliveries = JetStreamDeliveries(connection, MODEL)
        return Worker(connection, deliveries, Handover(connection, deliveries, MODEL, name))

    async with connected(nats_server) as one, connected(nats_server) as two:
        a, b = worker(one, "a"), worker(two, "b")
        for one_of_them in (a, b):
            await one_of_them.handover.start()
        admission = JetStreamAdmission(one)
        await admission.publish(FIRST)
        delivery = await a.deliveries.pull()
        assert not await a.handover.taken(FIRST, delivery)
        await flushed(one.client)
        await delivery.ack()
        yield admission, a, b
        await a.deliveries.stop()
        await b.deliveries.stop()


async def pulled(admission: JetStreamAdmission, worker: Worker, request: InferenceRequest) -> Any:
    await admission.publish(request)
    return await worker.deliveries.pull()


async def waiting(worker: Worker) -> asyncio.Task[Any]:
    """A slot of the worker that waits."""
    slot = asyncio.create_task(worker.deliveries.pull())
    await asyncio.sleep(0)
    return slot


async def test_the_worker_that_has_the_conversation_gets_its_next_request(
    pair: tuple[JetStreamAdmission, Worker, Worker],
) -> None:
    admission, a, b = pair
    request = chat(LONG, "an answer", "and then?")
    delivery = await pulled(admission, b, request)
    slot = await waiting(a)
    assert await b.handover.taken(request, delivery)
    passed_on = await slot
    assert (passed_on.data, passed_on.sequence, passed_on.num_delivered) == (delivery.data, delivery.sequence, 1)
    assert passed_on.headers[names.HEADER_MSG_ID] == request.id
    assert not await a.handover.taken(request, passed_on)
    await passed_on.in_progress()
    await passed_on.ack()
    assert not await admission.holds(request.id, delivery.sequence)


@pytest.mark.parametrize(
    "request_", [chat(LONG, "an answer", "and then?"), chat(LONG + "another", "an answer", "and then?"), chat("short")]
)
async def test_without_a_free_slot_or_a_conversation_the_request_stays(
    pair: tuple[JetStreamAdmission, Worker, Worker], request_: InferenceRequest
) -> None:
    admission, a, b = pair
    delivery = await pulled(admission, b, request_)
    began = time.monotonic()
    assert not await b.handover.taken(request_, delivery)
    assert time.monotonic() - began < handover.PATIENCE_S, "nobody had to be waited for"
    if len(delivery.data) >= handover.LEAST_BYTES:
        # From now on the conversation is here too.
        slot = await waiting(b)
        await flushed(b.connection.client)
        asked = names.conversation_subject(MODEL, (keys(request_) or ("", ""))[1])
        assert (await a.connection.requests.request(asked, timeout_s=20)).data == b"b"
        slot.cancel()
    await delivery.ack()


async def test_a_slot_does_not_wait_long_for_what_was_promised(
    pair: tuple[JetStreamAdmission, Worker, Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    admission, a, b = pair
    monkeypatch.setattr(handover, "RESERVED_S", 0.01)
    slot = await waiting(a)
    asked = names.conversation_subject(MODEL, (keys(FIRST) or ("", ""))[1])
    answer = await b.connection.requests.request(asked, timeout_s=20)
    assert answer.data == b"a"
    await admission.publish(chat("anything"))
    await (await slot).ack()


async def test_a_delivery_without_a_slot_goes_back(pair: tuple[JetStreamAdmission, Worker, Worker]) -> None:
    admission, _, b = pair
    request = chat(LONG, "an answer", "and then?")
    delivery = await pulled(admission, b, request)
    headers = {**delivery.headers, names.HEADER_ACK: delivery.ack_subject}
    await b.connection.client.publish(names.handover_subject("a"), delivery.data, headers=headers)
    again = await b.deliveries.pull()
    assert (again.sequence, again.num_delivered) == (delivery.sequence, 2)
    await again.ack()


async def test_a_request_that_comes_again_runs_where_it_is_pulled(
    pair: tuple[JetStreamAdmission, Worker, Worker],
) -> None:
    """The worker that has the conversation may be the one at which it failed."""
    admission, a, b = pair
    request = chat(LONG, "an answer", "and then?")
    await (await pulled(admission, b, request)).nak()
    again = await b.deliveries.pull()
    slot = await waiting(a)
    assert again.num_delivered == 2
    assert not await b.handover.taken(request, again)
    slot.cancel()
    await again.ack()


async def test_a_slot_whose_promise_lapses_asks_again_for_what_went_back(
    pair: tuple[JetStreamAdmission, Worker, Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    admission, a, b = pair
    monkeypatch.setattr(handover, "RESERVED_S", 0.05)
    slot = await waiting(a)
    asked = names.conversation_subject(MODEL, (keys(FIRST) or ("", ""))[1])
    await b.connection.requests.request(asked, timeout_s=20)
    await admission.publish(chat("anything"))
    # It came while the slot was reserved, and went back.
    delivery = await asyncio.wait_for(slot, 20)
    assert delivery.num_delivered == 2
    await delivery.ack()


async def test_a_worker_that_drains_or_is_gone_gets_nothing(pair: tuple[JetStreamAdmission, Worker, Worker]) -> None:
    admission, a, b = pair
    request = chat(LONG, "an answer", "and then?")
    delivery = await pulled(admission, b, request)
    slot = await waiting(a)
    await a.deliveries.stop()
    assert not await b.handover.taken(request, delivery)
    assert slot.cancelled()
    await a.connection.client.close()
    began = time.monotonic()
    other = chat(LONG, "an answer", "and then?", "another answer", "and then?")
    assert not await b.handover.taken(other, delivery)
    assert time.monotonic() - began < handover.PATIENCE_S, "nobody had to be waited for"
    await delivery.ack()
