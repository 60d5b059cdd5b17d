"""Whether a request is passed on, and to whom, without NATS."""

from forebay_contracts.queueing.protocols import Delivery
from forebay_contracts.wire.request import InferenceRequest
from forebay_inference.handover import keys
from support.conversations import LONG, chat
from support.twins import Twins


def test_the_key_of_a_conversation_is_that_of_its_next_request() -> None:
    first, second = keys(chat(LONG)), keys(chat(LONG, "an answer", "and then?"))
    third = keys(chat(LONG, "an answer", "and then?", "another", "go on"))
    assert first is not None
    assert second is not None
    assert third is not None
    assert (first[0], second[0], third[0]) == ("", first[1], second[1])
    assert keys(chat(LONG, adapter="other")) != first


def test_what_has_no_messages_or_none_that_json_holds_has_no_key() -> None:
    assert keys(chat()) is None
    assert keys(chat().model_copy(update={"messages": ({"role": "user", "content": 2**70},)})) is None


async def test_what_another_worker_has_taken_is_neither_run_nor_acknowledged_here() -> None:
    twins = Twins()
    asked: list[str] = []

    async def taken(request: InferenceRequest, _: Delivery) -> bool:
        asked.append(request.id)
        return True

    wanted = chat(LONG)
    await twins.queue.publish(wanted)
    delivery = await twins.queue.pull()
    await twins.runner(taken=taken).run(delivery)
    assert asked == [wanted.id]
    assert (delivery.verbs, await twins.states.get(wanted.id)) == ([], None)
