"""Messages and frames that nobody of ours would send."""

import asyncio
import json
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from forebay_contracts.wire.request import CompletionType, InferenceRequest
from forebay_contracts.wire.state import RequestStatus
from support.attack import STREAMS, attacked
from support.nats import NatsServer
from support.stack import MODEL, running
from support.view import holds

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
SUBJECT = "inference.requests.HuggingFaceTB-SmolLM2-135M-Instruct.chat"


@pytest.mark.parametrize("payload", [b"", b"not json", b"{}", b"\xff\xfe", b"[]", b'{"schema_version": 99}'])
async def test_unreadable_message_is_removed_and_counted(nats_server: NatsServer, payload: bytes) -> None:
    async with running(nats_server) as stack:
        ack = await stack.connection.jetstream.publish(SUBJECT, payload)
        assert ack.seq == 1
        await holds(stack, 0)
        assert (await stack.chat("hi")).status_code == 200
        await stack.idle()
        status = await stack.status()
        assert (status["total_failed"], status["total_processed"], status["active_requests"]) == (1, 1, 0)


async def test_unreadable_state_fails_its_request_alone(nats_server: NatsServer) -> None:
    async with running(nats_server, workers=0) as stack:
        answer = asyncio.create_task(stack.chat("[[tokens=20 delay_ms=50]]"))
        request_id = (await stack.taken(1, RequestStatus.QUEUED)).id
        bucket = await stack.connection.jetstream.key_value("inference-requests")
        await bucket.put(request_id, b'{"schema_version": 2}')
        looked_up = await stack.http.get(f"{stack.apis[0].url}/v1/queue/request/{request_id}")
        assert (looked_up.status_code, looked_up.json()["error"]["code"]) == (500, "state_unreadable")
        await stack.worker()
        assert ((await answer).status_code, (await answer).json()["error"]["code"]) == (500, "state_unreadable")
        assert (await stack.chat("hi")).status_code == 200
        await stack.idle()
        status = await stack.status()
        assert (status["total_failed"], status["total_processed"]) == (1, 1)


async def test_request_that_nobody_waits_for_does_not_run(nats_server: NatsServer) -> None:
    async with running(nats_server) as stack:
        forged = InferenceRequest(
            id="forged",
            completion_type=CompletionType.CHAT,
            model=NAME,
            created_at=time.time(),
            deadline=time.time() + 60,
            reply_to=f"inference.replies.{stack.apis[0].id}.forged",
            messages=({"role": "user", "content": "[[tokens=100000 delay_ms=1000]]"},),
        )
        await stack.connection.jetstream.publish(SUBJECT, forged.encode())
        await stack.reaches("forged", RequestStatus.CANCELLED)
        assert (await stack.chat("hi")).status_code == 200


async def test_hostile_frames_do_no_harm(nats_server: NatsServer) -> None:
    async with running(nats_server) as stack:
        api = stack.apis[0]
        answer = asyncio.create_task(stack.chat("[[tokens=30 delay_ms=50]]", stream=True))
        request_id = (await stack.begins()).id
        subject = f"inference.replies.{api.id}.{request_id}"
        for frame in (
            b"",
            b"\x00\xff",
            b"{}",
            b'{"type": "delta"}',
            b'{"type": "delta", "attempt": 0, "index": 0, "offset": 0, "tokens": [1], "text": "evil"}',
            b'{"type": "delta", "attempt": 1, "index": 0, "offset": 9999, "tokens": [1], "text": "evil"}',
            b'{"type": "completed", "attempt": 0, "choices": [], "usage": {}}',
            b'{"type": "completed", "attempt": 1, "choices": "all", "usage": {}}',
            b"[" * 100_000,
        ):
            await stack.connection.client.publish(subject, frame)
            await stack.connection.client.publish(f"inference.replies.{api.id}.nobody", frame)
            await stack.connection.client.publish(f"inference.resend.{request_id}", frame)
        for frame in (b"", b"junk"):
            await stack.connection.client.publish("$KV.inference-workers.x", frame)
            await stack.connection.client.publish("$KV.inference-apis.x", frame)
        text = (await answer).text
        assert "evil" not in text
        pieces = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        content = "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces)
        assert content == " ".join(f"t{n}" for n in range(30))
        assert (await stack.chat("hi")).status_code == 200


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    frames=st.lists(
        st.one_of(
            st.builds(
                lambda offset, count, attempt: {
                    "type": "delta",
                    "attempt": attempt,
                    "offset": offset,
                    "tokens": list(range(offset, offset + count)),
                    "text": "".join(f"<{n}>" for n in range(offset, offset + count)),
                },
                st.integers(0, 12),
                st.integers(0, 4),
                st.integers(1, 3),
            ),
            st.builds(lambda attempt: {"type": "started", "attempt": attempt, "worker": "w"}, st.integers(1, 3)),
        ),
        max_size=40,
    )
)
def test_whatever_order_frames_come_in_no_token_is_doubled_or_left_out(frames: list[dict[str, object]]) -> None:
    from forebay_api.in_flight.live_answer import LiveAnswer
    from forebay_contracts.wire.frames import decode_frame

    request = InferenceRequest(
        id="x", completion_type=CompletionType.CHAT, model=MODEL, created_at=0, deadline=0, reply_to=""
    )
    answer = LiveAnswer(request, lambda _: None)
    for frame in frames:
        answer.receive(decode_frame(json.dumps(frame).encode()))
    have = answer._have().choices
    tokens = have[0].tokens if have else ()
    assert tokens == tuple(range(len(tokens)))
    assert "".join(delta.text for delta in answer._unread) == "".join(f"<{n}>" for n in tokens)


async def test_no_body_is_felt_by_other_clients(nats_server: NatsServer) -> None:
    """As `make soak ARGS=bodies`, with fewer bodies, and in CPU time: the machine may do other work."""
    refused, served = ["prompt {}", "input []"], ["token ids", "content parts"]
    async with running(nats_server, max_concurrent_requests=2 * STREAMS) as stack:
        felt = await attacked(stack, refused + served, at_once=3)
    assert felt.statuses == {kind: {"400": 3} for kind in refused} | {kind: {"200": 3} for kind in served}
    assert not felt.wrong
    # Each of the first held up the api for seconds once, and the others together.
    assert felt.cpu_s < 1
    assert max(felt.health_s, felt.token_s) < 10  # a wait that computes nothing, such as a lock that is held
