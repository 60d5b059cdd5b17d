"""The messages of earlier schema versions, as they were recorded, through the services of today."""

import asyncio
import json
import time
import uuid
from pathlib import Path
from typing import Any, Literal

import pytest
from nats.aio.msg import Msg
from pydantic import BaseModel, ValidationError

from forebay_contracts.wire import names
from forebay_contracts.wire.frames import Resume, decode_frame
from forebay_contracts.wire.heartbeats import ApiInfo, WorkerInfo
from forebay_contracts.wire.message import SCHEMA_VERSION
from forebay_contracts.wire.request import InferenceRequest
from forebay_contracts.wire.state import RequestState, RequestStatus
from support.nats import NatsServer
from support.stack import MODEL, Stack, running

FOLDER = Path(__file__).parent
VERSIONS = sorted(path.name for path in FOLDER.glob("v*"))
KINDS: dict[str, type[BaseModel]] = {
    "requests": InferenceRequest,
    "states": RequestState,
    "workers": WorkerInfo,
    "apis": ApiInfo,
    "resumes": Resume,
}
NEWER = 99
"""A schema that no service knows yet."""
SUBJECT = f"inference.requests.HuggingFaceTB-{MODEL}."


def recorded(version: str, kind: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((FOLDER / version / f"{kind}.json").read_text())
    assert found
    return found


def newer(message: Any) -> Any:
    """As a newer minor version might write it: with a field more in each object."""
    if isinstance(message, dict):
        return {key: newer(value) for key, value in message.items()} | {"added_later": {"by": ["a newer", "version"]}}
    return [newer(one) for one in message] if isinstance(message, list) else message


def test_the_present_schema_is_recorded() -> None:
    assert f"v{SCHEMA_VERSION}" in VERSIONS


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_everything_recorded_is_read(version: str, kind: str) -> None:
    for message in recorded(version, kind):
        read = KINDS[kind].model_validate_json(json.dumps(message))
        # Nothing of it is lost: a field that was renamed would be.
        assert contains(json.loads(read.model_dump_json()), message)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_recorded_frame_is_read(version: str) -> None:
    for frame in recorded(version, "frames"):
        assert contains(json.loads(decode_frame(json.dumps(frame).encode()).model_dump_json()), frame)
        assert decode_frame(json.dumps(newer(frame)).encode()) == decode_frame(json.dumps(frame).encode())


@pytest.mark.parametrize("kind", ["workers", "apis", "states", "resumes"])
def test_fields_of_a_newer_version_are_ignored(kind: str) -> None:
    for message in recorded(f"v{SCHEMA_VERSION}", kind):
        added = {**message, "added_later": 1}
        assert KINDS[kind].model_validate(added) == KINDS[kind].model_validate(message)


@pytest.mark.parametrize("kind", ["requests", "states", "workers", "apis"])
def test_a_newer_schema_is_refused(kind: str) -> None:
    for message in recorded(f"v{SCHEMA_VERSION}", kind):
        with pytest.raises(ValidationError, match="schema_version"):
            KINDS[kind].model_validate(message | {"schema_version": NEWER})


class RequestOfSchema1(InferenceRequest):
    """As a service reads it that knows no adapters."""

    schema_version: Literal[1] = 1  # type: ignore[assignment]


def test_a_request_with_an_adapter_is_not_read_without_it() -> None:
    message = recorded("v1", "requests")[0]
    plain = InferenceRequest.model_validate(message)
    assert RequestOfSchema1.model_validate_json(plain.encode()).id == plain.id
    adapted = plain.model_copy(update={"adapter": "red"})
    read = InferenceRequest.model_validate_json(adapted.encode())
    assert (read.adapter, read.named_model) == ("red", f"{plain.model}:red")
    assert read.encode() == adapted.encode()
    with pytest.raises(ValidationError, match="schema_version"):
        RequestOfSchema1.model_validate_json(adapted.encode())


def contains(whole: Any, part: Any) -> bool:
    """Whether everything in `part` stands in `whole`, which may hold defaults besides."""
    if isinstance(part, dict):
        return all(key in whole and contains(whole[key], value) for key, value in part.items())
    if isinstance(part, list):
        return len(whole) == len(part) and all(map(contains, whole, part))
    return bool(whole == part)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("added", [False, True])
async def test_old_requests_through_a_worker_of_today(nats_server: NatsServer, version: str, added: bool) -> None:
    """Published as an api of that version did, which is played here; the worker answers each to its end."""
    async with running(nats_server, max_deliveries=1) as stack:
        client = stack.connection.client
        (api,) = recorded(version, "apis")
        ends: dict[str, asyncio.Future[str]] = {}

        async def answer(msg: Msg) -> None:
            kind, end = json.loads(msg.data)["type"], ends[msg.subject.rsplit(".", 1)[1]]
            if kind in ("completed", "failed") and not end.done():
                end.set_result(kind)
            if msg.reply:
                await msg.respond(json_of({"wanted": False, "outcome": kind} if end.done() else {}))

        await client.subscribe(names.reply_subjects(api["id"]), cb=answer)
        beating = asyncio.create_task(beat(stack, names.APIS_BUCKET, api))
        expected = {}
        for message in recorded(version, "requests"):
            text = json.dumps(message)
            if "delay_ms" in text:
                continue  # recorded for its timeout
            request_id, now = str(uuid.uuid4()), time.time()
            ends[request_id] = asyncio.get_running_loop().create_future()
            fresh = message | {"id": request_id, "created_at": now, "deadline": now + 30}
            fresh["reply_to"] = names.reply_subject(api["id"], request_id)
            # Only what is Forebay's own: messages and tools are the client's, and go to the model as they are.
            fresh |= {"added_later": 1, "sampling": message.get("sampling", {}) | {"added_later": 2}} if added else {}
            await stack.connection.jetstream.publish(
                SUBJECT + message["completion_type"], json_of(fresh), headers={"Nats-Msg-Id": request_id}
            )
            expected[request_id] = "failed" if "fail]]" in text else "completed"
        async with asyncio.timeout(30):
            assert {request_id: await end for request_id, end in ends.items()} == expected
        for request_id, end in expected.items():
            await stack.reaches(request_id, RequestStatus(end))
        beating.cancel()


async def beat(stack: Stack, bucket: str, service: dict[str, Any]) -> None:
    """The heartbeat of a service that is played here, for ever."""
    while True:
        subject = names.bucket_subjects(bucket).removesuffix(">") + service["id"]
        await stack.connection.client.publish(subject, json_of(service))
        await asyncio.sleep(1)


def json_of(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode()


async def test_a_request_of_a_newer_schema_is_removed(nats_server: NatsServer) -> None:
    async with running(nats_server) as stack:
        message = recorded(f"v{SCHEMA_VERSION}", "requests")[0] | {"schema_version": NEWER}
        request_id = str(uuid.uuid4())
        reply_to = names.reply_subject("api-of-tomorrow", request_id)
        replies = await stack.connection.client.subscribe(reply_to)
        headers = {names.HEADER_MSG_ID: request_id, names.HEADER_REPLY_TO: reply_to}
        await stack.connection.jetstream.publish(SUBJECT + "chat", json_of(message), headers=headers)
        frame = json.loads((await replies.next_msg(timeout=10)).data)
        assert (frame["type"], frame["status"], frame["code"]) == ("failed", 500, "inference_failed")
        await stack.idle()
        assert (await stack.status())["total_failed"] == 1
        assert (await stack.chat("[[tokens=1]]")).status_code == 200


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("added", [False, True])
async def test_old_frames_and_states_through_an_api_of_today(
    nats_server: NatsServer, version: str, added: bool
) -> None:
    """A worker of that version is played here: its heartbeat, its frames, its state."""
    async with running(nats_server, workers=0) as stack:
        connection = stack.connection
        wrap = newer if added else lambda message: message
        (worker,) = recorded(version, "workers")
        beating = asyncio.create_task(beat(stack, names.WORKERS_BUCKET, wrap(worker)))
        states = names.bucket_subjects(names.REQUESTS_BUCKET).removesuffix(">")
        for state in recorded(version, "states"):
            request_id = str(uuid.uuid4())
            await connection.jetstream.publish(states + request_id, json_of(wrap(state | {"id": request_id})))
            answer = await stack.http.get(f"{stack.apis[0].url}/v1/queue/request/{request_id}")
            assert (answer.status_code, answer.json()["status"]) == (200, state["status"])
        pull = await connection.jetstream.pull_subscribe_bind(durable=f"HuggingFaceTB-{MODEL}", stream=names.STREAM)
        asked = asyncio.create_task(stack.chat("hello", n=2))
        (message,) = await pull.fetch(1, timeout=20)
        reply_to = json.loads(message.data)["reply_to"]
        # The first answer that was recorded: two choices of three tokens.
        for frame in recorded(version, "frames"):
            if frame["type"] == "completed":
                resume = Resume.model_validate_json(
                    (await connection.client.request(reply_to, json_of(wrap(frame)), timeout=10)).data
                )
                assert resume.outcome is RequestStatus.COMPLETED
                break
            await connection.client.publish(reply_to, json_of(wrap(frame)))
        await message.ack()
        answer = await asked
        assert [choice["message"]["content"] for choice in answer.json()["choices"]] == ["t0 t1 t2"] * 2
        health = await stack.http.get(f"{stack.apis[0].url}/health/ready")
        assert [one["id"] for one in health.json()["workers"]] == [worker["id"]]
        beating.cancel()
