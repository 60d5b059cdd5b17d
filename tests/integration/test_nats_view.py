"""What a user of the `nats` command line sees: by the JetStream API requests that it sends, and by subscribing."""

import asyncio
import base64
import json
import math
import time
from typing import Any

import pytest
from nats.aio.msg import Msg

from forebay_contracts.wire.state import RequestStatus
from support.nats import NatsServer, flushed
from support.stack import MODEL, Stack, running
from support.view import consumer_reaches, holds, idle, jetstream

CONSUMER = f"HuggingFaceTB-{MODEL}"
SECOND_NS = 1_000_000_000


async def message(stack: Stack, stream: str, **which: Any) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
    """Headers, payload as JSON and the rest of a message, as `nats stream get` reads it."""
    answer = await jetstream(stack, f"STREAM.MSG.GET.{stream}", which)
    assert "error" not in answer, answer
    found = answer["message"]
    lines = base64.b64decode(found.get("hdrs", "")).decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines if ": " in line)
    return headers, json.loads(base64.b64decode(found.get("data", ""))), found


async def heartbeat_at_rest(stack: Stack, worker: str) -> dict[str, Any]:
    """Wait for a worker's heartbeat that tells of no request under way."""
    bucket = await stack.connection.jetstream.key_value("inference-workers")
    watcher = await bucket.watch(worker)
    try:
        async with asyncio.timeout(20):
            async for entry in watcher:
                if entry is not None and entry.value:
                    found: dict[str, Any] = json.loads(entry.value)
                    if found["busy"] == 0:
                        return found
    finally:
        await watcher.stop()
    raise AssertionError("the watch ended")


class Listener:
    """`nats sub`: every message on some subjects, in order."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._changed = asyncio.Event()
        self.heard: list[Msg] = []

    async def listen(self, subject: str) -> "Listener":
        async def hear(msg: Msg) -> None:
            self.heard.append(msg)
            self._changed.set()

        await self._stack.connection.client.subscribe(subject, cb=hear)
        await flushed(self._stack.connection.client)
        return self

    async def until(self, subject_part: str, payload_part: bytes) -> None:
        """Wait for a message."""
        async with asyncio.timeout(30):
            while not any(subject_part in msg.subject and payload_part in msg.data for msg in self.heard):
                self._changed.clear()
                await self._changed.wait()

    def on(self, prefix: str) -> list[Msg]:
        return [msg for msg in self.heard if msg.subject.startswith(prefix)]


async def test_streams_and_consumer(nats_server: NatsServer) -> None:
    """`nats stream ls`, `nats stream info INFERENCE`, `nats consumer info INFERENCE …`."""
    async with running(nats_server, max_queue_size=5, max_concurrent_requests=2, ack_wait=2) as stack:
        names = await jetstream(stack, "STREAM.NAMES")
        assert sorted(names["streams"]) == [
            "INFERENCE",
            "INFERENCE_ANSWERS",
            "INFERENCE_BATCHES",
            "INFERENCE_COUNTERS",
            "INFERENCE_DEFERRED",
            "INFERENCE_FAILED",
            "INFERENCE_USAGE",
            "INFERENCE_WEBHOOKS",
            "KV_inference-answers",
            "KV_inference-apis",
            "KV_inference-batches",
            "KV_inference-requests",
            "KV_inference-responses",
            "KV_inference-workers",
            "OBJ_inference-files",
        ]
        config = (await jetstream(stack, "STREAM.INFO.INFERENCE"))["config"]
        wanted = {
            "subjects": ["inference.requests.>"],
            "retention": "workqueue",
            "storage": "file",
            "discard": "new",
            "max_msgs": 5,
            "allow_msg_ttl": True,
            "duplicate_window": 120 * SECOND_NS,
            "num_replicas": 1,
        }
        assert {name: config[name] for name in wanted} == wanted
        assert "subject_delete_marker_ttl" not in config
        consumer = await jetstream(stack, f"CONSUMER.INFO.INFERENCE.{CONSUMER}")
        wanted = {
            "durable_name": CONSUMER,
            "filter_subject": f"inference.requests.{CONSUMER}.*",
            "ack_policy": "explicit",
            "max_ack_pending": 2,
            "max_deliver": -1,
            "ack_wait": 2 * SECOND_NS,
        }
        assert {name: consumer["config"][name] for name in wanted} == wanted
        assert "backoff" not in consumer["config"]
        assert "deliver_subject" not in consumer["config"]
        counters = (await jetstream(stack, "STREAM.INFO.INFERENCE_COUNTERS"))["config"]
        assert counters["subjects"] == ["inference.counters.>"]
        assert counters["allow_msg_counter"] is True
        states = (await jetstream(stack, "STREAM.INFO.KV_inference-requests"))["config"]
        assert (states["max_msgs_per_subject"], states["max_age"]) == (1, 3600 * SECOND_NS)


@pytest.mark.parametrize("kind", ["chat", "completion"])
async def test_request_in_the_stream(nats_server: NatsServer, kind: str) -> None:
    """`nats stream get INFERENCE`, `nats stream info` and `nats consumer info` with one that waits."""
    async with running(nats_server, workers=0, request_timeout=45) as stack:
        before = time.time()
        if kind == "chat":
            task = asyncio.create_task(stack.chat("Grüße", temperature=0.5, stop=["x"], seed=7))
        else:
            body = {"model": MODEL, "prompt": "Grüße", "max_tokens": 9}
            task = asyncio.create_task(stack.http.post(f"{stack.apis[0].url}/v1/completions", json=body))
        request_id = (await stack.taken(1)).id
        headers, payload, found = await message(stack, "INFERENCE", seq=1)
        assert found["subject"] == f"inference.requests.{CONSUMER}.{kind}"
        assert "Grüße" in base64.b64decode(found["data"]).decode()  # readable, not escaped
        deadline = payload["deadline"]
        assert pytest.approx(deadline - payload["created_at"]) == 45
        assert before <= payload["created_at"] <= time.time()
        latest, earliest = (math.ceil(deadline - at) + 30 for at in (before, time.time()))
        assert earliest <= int(headers.pop("Nats-TTL")) <= latest
        assert headers == {
            "Nats-Msg-Id": request_id,
            "Forebay-Deadline": f"{deadline:.3f}",
            "Forebay-Reply-To": f"inference.replies.{stack.apis[0].id}.{request_id}",
        } | {name: value for name, value in headers.items() if name == "traceparent"}
        expected = {
            "schema_version": 1,
            "id": request_id,
            "completion_type": kind,
            "model": f"HuggingFaceTB/{MODEL}",
            "created_at": payload["created_at"],
            "deadline": deadline,
            "reply_to": headers["Forebay-Reply-To"],
        }
        if kind == "chat":
            expected["messages"] = [{"role": "user", "content": "Grüße"}]
            left = ["top_p", "top_k", "repetition_penalty"]
            expected["sampling"] = {"temperature": 0.5, "stop": ["x"], "seed": 7, "unset": left}
        else:
            expected["prompts"] = ["Grüße"]
            left = ["temperature", "top_p", "top_k", "repetition_penalty"]
            expected["sampling"] = {"max_tokens": 9, "unset": left}
        assert payload == expected
        state = (await jetstream(stack, "STREAM.INFO.INFERENCE", {"subjects_filter": ">"}))["state"]
        assert (state["messages"], state["subjects"]) == (1, {f"inference.requests.{CONSUMER}.{kind}": 1})
        await consumer_reaches(stack, CONSUMER, num_pending=1, num_ack_pending=0)
        task.cancel()
        await holds(stack, 0)


async def test_processing_seen_by_consumer_info(nats_server: NatsServer) -> None:
    async with running(nats_server) as stack:
        endless = asyncio.create_task(stack.chat("[[tokens=100000 delay_ms=40]]"))
        await stack.begins()
        tasks = [asyncio.create_task(stack.chat("[[tokens=1]]")) for _ in range(2)]
        await holds(stack, 3)
        await consumer_reaches(stack, CONSUMER, num_pending=2, num_ack_pending=1, num_redelivered=0)
        endless.cancel()
        assert [(await task).status_code for task in tasks] == [200] * 2
        await idle(stack)
        consumer = await consumer_reaches(stack, CONSUMER, num_pending=0, num_ack_pending=0)
        assert consumer["ack_floor"]["stream_seq"] == 3


async def test_states_and_heartbeats(nats_server: NatsServer) -> None:
    """`nats kv ls` and `nats kv get` for requests, workers and apis."""
    async with running(nats_server, max_concurrent_requests=3) as stack:
        ids = [(await stack.chat("[[tokens=2]]")).headers["x-request-id"] for _ in range(2)]
        await idle(stack)
        subjects = await jetstream(stack, "STREAM.INFO.KV_inference-requests", {"subjects_filter": "$KV.>"})
        assert subjects["state"]["subjects"] == {f"$KV.inference-requests.{one}": 1 for one in ids}
        _, state, _ = await message(stack, "KV_inference-requests", last_by_subj=f"$KV.inference-requests.{ids[0]}")
        times = {
            name: state.pop(name)
            for name in (*("timestamp", "queued_at", "started_at", "first_token_at", "finished_at", "deadline"),)
        }
        assert state == {
            "schema_version": 1,
            "id": ids[0],
            "status": "completed",
            "completion_type": "chat",
            "error": None,
            "fault": None,
            "model": f"HuggingFaceTB/{MODEL}",
            "attempt": 1,
            "worker": stack.workers[0].id,
            "sequence": 1,
            "handed_over": 0,
            "usage": {"prompt_tokens": 1, "completion_tokens": 2, "cached_tokens": 0, "reasoning_tokens": 0},
            "key": None,
            "logged": False,
            "deferred": None,
            "turn": 0,
            "notify": None,
            "cut": False,
            "retryable": False,
            "tier": "default",
            "attempts": [],
            "attempt_at": None,
            "resumed": 0,
        }
        assert times["timestamp"] == times["queued_at"] < times["started_at"] < times["first_token_at"]
        assert times["first_token_at"] <= times["finished_at"] < times["deadline"]

        worker_id, api_id = stack.workers[0].id, stack.apis[0].id
        worker = await heartbeat_at_rest(stack, worker_id)
        assert time.time() - worker.pop("heartbeat_at") < 30
        assert time.time() - worker.pop("started_at") < 60
        assert isinstance(worker.pop("version"), str)
        assert worker == {
            "schema_version": 1,
            "id": worker_id,
            "model": f"HuggingFaceTB/{MODEL}",
            "limits": {"max_concurrent_requests": 3, "ack_wait": 2},
            "aliases": [MODEL],
            "adapters": [],
            "status": "ready",
            "progress": None,
            "slots": 3,
            "busy": 0,
            "context_length": 1 << 20,
            "quantization": "none",
            "device": "none",
            "engine": "simulated",
            "completion_types": ["chat", "completion", "embedding", "rerank"],
        }
        _, api, _ = await message(stack, "KV_inference-apis", last_by_subj=f"$KV.inference-apis.{api_id}")
        assert api["id"] == api_id
        # A worker that stops takes its heartbeat with it: a delete marker is the last of it.
        await stack.workers[0].stop()
        last = {"last_by_subj": f"$KV.inference-workers.{worker_id}"}
        marker = (await jetstream(stack, "STREAM.MSG.GET.KV_inference-workers", last))["message"]
        assert "data" not in marker
        assert "KV-Operation: DEL" in base64.b64decode(marker["hdrs"]).decode()


async def test_counters(nats_server: NatsServer) -> None:
    """`nats counter get`: the last message of each counter's subject."""
    async with running(nats_server, max_deliveries=1, request_timeout=3) as stack:
        for order in ("hi", "hi", "[[fail]]", "[[tokens=100 delay_ms=100]]"):
            await stack.chat(order)
        await idle(stack)
        values = {}
        for outcome in ("completed", "failed", "timed_out"):
            headers, value, _ = await message(stack, "INFERENCE_COUNTERS", last_by_subj=f"inference.counters.{outcome}")
            assert headers["Nats-Incr"] == "+1"
            values[outcome] = value
        assert values == {"completed": {"val": "2"}, "failed": {"val": "1"}, "timed_out": {"val": "1"}}
        absent = await jetstream(
            stack, "STREAM.MSG.GET.INFERENCE_COUNTERS", {"last_by_subj": "inference.counters.cancelled"}
        )
        assert absent["error"]["code"] == 404


@pytest.mark.parametrize("stream", [False, True])
async def test_frames_of_a_chat(nats_server: NatsServer, stream: bool) -> None:
    """`nats sub 'inference.>'` while one chat is answered."""
    async with running(nats_server) as stack:
        listener = await Listener(stack).listen("inference.>")
        # Tokens that come within 20 ms travel together.
        response = await stack.chat("[[tokens=4 delay_ms=50]]" if stream else "[[tokens=4]]", stream=stream)
        request_id = response.headers["x-request-id"]
        # What api and worker send may cross: NATS keeps the order of one connection.
        for subject in ("requests", "admitted", "counters.completed"):
            await listener.until(f"inference.{subject}", b"")
        reply_to = f"inference.replies.{stack.apis[0].id}.{request_id}"
        # A worker whose slot waits again says so a moment later.
        assert {msg.subject for msg in listener.heard} - {f"inference.idle.{CONSUMER}"} == {
            f"inference.requests.{CONSUMER}.chat",
            f"inference.admitted.{CONSUMER}",
            reply_to,
            "inference.counters.completed",
        }
        (request,) = listener.on("inference.requests.")
        assert json.loads(request.data)["id"] == request_id
        frames = [json.loads(msg.data) for msg in listener.on("inference.replies.")]
        assert {frame["attempt"] for frame in frames} == {1}
        assert time.time() - 60 < frames[-1].pop("at") < time.time() + 1
        usage = {"prompt_tokens": 1 + stream, "completion_tokens": 4}
        completed = {
            "type": "completed",
            "attempt": 1,
            "choices": [{"index": 0, "finish_reason": "stop", "tokens": 4}],
            "usage": usage,
        }
        started = {"type": "started", "attempt": 1, "worker": stack.workers[0].id, "prompt_tokens": 2}
        if stream:
            first = {"type": "delta", "attempt": 1, "tokens": [0], "text": "t0"}
            others = [{"type": "delta", "attempt": 1, "offset": n, "tokens": [n], "text": f" t{n}"} for n in (1, 2, 3)]
            assert frames == [started, first, *others, completed]
        else:
            # Nobody reads along, so the tokens come together, here with the end; what ends at once is not announced.
            whole = {"attempt": 1, "tokens": [0, 1, 2, 3], "text": "t0 t1 t2 t3"}
            assert frames[-1] == {**completed, "deltas": [whole]}
            assert frames[:-1] in ([], [started])
        # Only the terminal frame waits for an answer.
        assert [bool(msg.reply) for msg in listener.on("inference.replies.")] == [False] * (len(frames) - 1) + [True]


async def test_an_answer_that_takes_its_time_is_announced(nats_server: NatsServer) -> None:
    async with running(nats_server) as stack:
        listener = await Listener(stack).listen("inference.replies.>")
        assert (await stack.chat("[[tokens=3 delay_ms=30]]")).status_code == 200
        await listener.until("inference.replies.", b'"completed"')
        frames = [json.loads(msg.data) for msg in listener.heard]
        begun = {"type": "started", "attempt": 1, "worker": stack.workers[0].id, "prompt_tokens": 2}
        assert frames[0] == begun
        assert frames[-1]["type"] == "completed"


async def test_frames_of_a_failure(nats_server: NatsServer) -> None:
    async with running(nats_server, max_deliveries=2) as stack:
        listener = await Listener(stack).listen("inference.replies.>")
        await stack.chat("[[tokens=1 fail]]", stream=True)
        await listener.until("inference.replies.", b'"failed"')
        frames = [json.loads(msg.data) for msg in listener.heard]
        assert [(frame["type"], frame["attempt"]) for frame in frames] == [
            ("started", 1),
            ("delta", 1),
            ("started", 2),
            ("failed", 2),
        ]
        assert frames[-1] == {
            "type": "failed",
            "attempt": 2,
            "status": 500,
            "error_type": "server_error",
            "code": "inference_failed",
            "message": "the generation failed",
        }


async def test_cancellation_is_heard(nats_server: NatsServer) -> None:
    async with running(nats_server) as stack:
        listener = await Listener(stack).listen("inference.cancel.>")
        task = asyncio.create_task(stack.chat("[[tokens=1000 delay_ms=20]]"))
        request_id = (await stack.begins()).id
        await stack.http.delete(f"{stack.apis[0].url}/v1/queue/request/{request_id}")
        assert (await task).status_code == 499
        await listener.until(request_id, b"by DELETE")
        # By the api that was asked, and once more by the one whose client was told.
        assert {msg.subject for msg in listener.heard} == {f"inference.cancel.{request_id}"}
        await stack.reaches(request_id, RequestStatus.CANCELLED)
        # A user may cancel by hand, too: `nats pub inference.cancel.ID reason`.
        task = asyncio.create_task(stack.chat("[[tokens=1000 delay_ms=20]]"))
        request_id = (await stack.taken(2, RequestStatus.PROCESSING)).id
        await stack.connection.client.publish(f"inference.cancel.{request_id}", b"by hand")
        assert (await task).status_code == 499
        assert (await stack.reaches(request_id, RequestStatus.CANCELLED)).error == "by hand"
        assert (await idle(stack))["total_cancelled"] == 2
