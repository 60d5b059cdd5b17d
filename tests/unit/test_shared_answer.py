"""One answer for several clients: each gets all of it, whenever it comes and however slowly it reads."""

import time

import pytest

from forebay_api.in_flight import live_answer
from forebay_api.in_flight.idempotency import KeptAnswer, SharedAnswer
from forebay_api.in_flight.live_answer import LiveAnswer
from forebay_contracts.wire.errors import RequestTimeout
from forebay_contracts.wire.frames import Completed, Delta, FinishedChoice, Started
from forebay_contracts.wire.state import Usage
from support.twins import request

TOKENS = 5


def delta(offset: int) -> Delta:
    return Delta(attempt=2, offset=offset, tokens=(offset,), text=f"t{offset} ")


def end() -> Completed:
    return Completed(
        attempt=2,
        choices=(FinishedChoice(index=0, finish_reason="stop", tokens=TOKENS),),
        usage=Usage(prompt_tokens=1, completion_tokens=TOKENS),
        deltas=(delta(TOKENS - 1), Delta(attempt=2, offset=TOKENS, text="end")),
    )


def shared_answer() -> SharedAnswer:
    shared = SharedAnswer("key", KeptAnswer(request_id="r", body_hash="hash", api="api"))
    shared.led_by("leader")
    return shared


async def text(answer: LiveAnswer) -> str:
    await answer.started()
    return "".join([delta.text async for some in answer.deltas() for delta in some])


async def test_early_late_and_slow_clients_get_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_answer, "MAX_UNREAD_DELTAS", 1)
    shared, whole = shared_answer(), "t0 t1 t2 t3 t4 end"
    async with shared.read(request()) as early:
        shared.receive(Started(attempt=1, worker="w"))
        for offset in range(TOKENS):
            shared.receive(delta(offset))
        async with shared.read(request()) as late:
            shared.receive(end())
            async with shared.read(request()) as last:
                assert [await text(answer) for answer in (early, late, last)] == [whole] * 3


async def test_a_client_that_waits_no_longer_leaves_the_others_alone() -> None:
    shared = shared_answer()
    async with shared.read(request(deadline=time.time() + 60)) as patient, shared.read(request()) as impatient:
        impatient.time_out()
        with pytest.raises(RequestTimeout):
            await impatient.started()
        shared.receive(Started(attempt=1, worker="w"))
        await patient.started()


async def test_every_client_is_told_the_request_that_leads() -> None:
    shared = shared_answer()
    async with shared.read(request(id="own")) as answer:
        assert answer.request.id == "leader"
