"""JSON lines carry what is known as fields; prompts are in them only where LOG_PROMPTS asks for it."""

import asyncio
import json
from typing import Any

import pytest

from support.nats import NatsServer
from support.service import Service
from support.stack import MODEL, running
from support.view import idle

PROMPT = "xyzzy"
NAME = f"HuggingFaceTB/{MODEL}"


def records(service: Service, request_id: str) -> list[dict[str, Any]]:
    """A service's lines that have the field `request_id`."""
    found = [json.loads(line) for line in service.log]
    return [record for record in found if record.get("request_id") == request_id]


async def test_each_step_has_its_fields(nats_server: NatsServer) -> None:
    async with running(nats_server, log_format="json") as stack:
        answer = await stack.chat(f"{PROMPT} [[tokens=3 delay_ms=20]]")
        request_id = answer.headers["x-request-id"]
        await idle(stack)
        for service in (stack.apis[0], stack.workers[0]):
            await service.stop()
        received, queued, completed = records(stack.apis[0], request_id)
        processing, ended = records(stack.workers[0], request_id)
        every = (received, queued, completed, processing, ended)
        assert {(record["model"], record["type"]) for record in every} == {(NAME, "chat")}
        assert completed["attempt"] == processing["attempt"] == ended["attempt"] == 1
        assert (completed["prompt_tokens"], completed["completion_tokens"]) == (3, 3)
        assert ended["outcome"] == "completed"
        assert "code" not in ended
        assert 0 <= ended["queue_wait_s"] < ended["time_to_first_token_s"] < ended["total_s"]
        assert 0.05 <= ended["total_s"] < 10  # a timer of uvloop may end up to a millisecond early


@pytest.mark.parametrize("stream", [False, True])
async def test_each_end_has_its_fields(nats_server: NatsServer, stream: bool) -> None:
    """Whoever ends a request, and whether it ran or waited: one line says what became of it and after how long."""
    limits = {"max_concurrent_requests": 1, "max_deliveries": 1, "request_timeout": 2}
    async with running(nats_server, log_format="json", **limits) as stack:
        failed = await stack.chat("[[tokens=2 fail]]", stream=stream)
        slow = [asyncio.create_task(stack.chat("[[tokens=90 delay_ms=50]]", stream=stream)) for _ in range(2)]
        ran, waited = [(await stack.taken(nth)).id for nth in (2, 3)]
        left = asyncio.create_task(stack.chat("[[tokens=1]]", stream=stream))
        cancelled = (await stack.taken(4)).id
        await stack.http.delete(f"{stack.apis[0].url}/v1/queue/request/{cancelled}")
        answers = [failed, *await asyncio.gather(*slow, left)]
        ids = [failed.headers["x-request-id"], ran, waited, cancelled]
        await idle(stack)
        for service in (*stack.apis, *stack.workers):
            await service.stop()
        ended = [
            [one for service in (stack.apis[0], stack.workers[0]) for one in records(service, id) if "outcome" in one]
            for id in ids
        ]
        outcomes = ["failed", "timed_out", "timed_out", "cancelled"]
        for request_id, outcome, lines in zip(ids, outcomes, ended, strict=True):
            assert {line["outcome"] for line in lines} == {outcome}, lines
            for line in lines:
                assert (line["request_id"], line["model"], line["type"]) == (request_id, NAME, "chat")
                assert line["attempt"] in (0, 1)
                assert line["total_s"] >= 0
        # What the clients were answered is a line of the api's, with its code.
        for request_id, answer in zip(ids, answers, strict=True):
            (told,) = [
                one
                for one in records(stack.apis[0], request_id)
                if "answered" in one["message"] or "broke" in one["message"]
            ]
            assert told["model"] == NAME
            assert told["total_s"] >= 0
            assert answer.status_code == (200 if "broke" in told["message"] else int(told["message"].split()[-2]))
            assert told["code"] in ("inference_failed", "request_timeout", "request_cancelled")


@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_wrong_with_a_request_is_logged_as_a_code(nats_server: NatsServer, stream: bool) -> None:
    async with running(nats_server, log_format="json") as stack:
        # The engine's own refusal quotes the order.
        answer = await stack.chat(f"[[{PROMPT}]]", stream=stream)
        assert answer.status_code == 400
        assert PROMPT in answer.json()["error"]["message"]
        request_id = answer.headers["x-request-id"]
        await idle(stack)
        await stack.workers[0].stop()
        (ended,) = [record for record in records(stack.workers[0], request_id) if "outcome" in record]
        assert (ended["outcome"], ended["code"]) == ("failed", "invalid_request_error")
        for service in (*stack.apis, *stack.workers):
            assert not [line for line in await service.whole_log() if PROMPT in line]


async def test_prompts_are_logged_where_that_is_asked_for(nats_server: NatsServer) -> None:
    async with running(nats_server, log_prompts="true", api_keys="sk-plugh") as stack:
        stack.http.headers["authorization"] = "Bearer sk-plugh"
        answer = await stack.chat(PROMPT)
        assert answer.status_code == 200
        log = await stack.apis[0].whole_log()
        lines = [line for line in log if PROMPT in line]
        assert len(lines) == 1
        assert f"[Chat Completions] {answer.headers['x-request-id']} asks" in lines[0]
        assert not [line for line in log if "sk-plugh" in line]
