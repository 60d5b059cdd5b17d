"""The log lines that the reference document's users look for, each with its request's id, and what is in none."""

import asyncio
import json
import re
from typing import Any

import pytest

from forebay_contracts.wire.state import RequestStatus
from support.nats import NatsServer
from support.stack import MODEL, Service, Stack, first_to_log, running
from support.view import idle

MODEL_PATTERN = re.escape(f"HuggingFaceTB/{MODEL}")
PROMPT = "xyzzy"
KEY = "sk-plugh"
WRONG_KEY = "sk-plover"


def lines_about(service: Service, request_id: str) -> list[str]:
    """A service's lines with a request's id, without their time and level."""
    return [re.sub(r"^\S+ \S+ (INFO|WARNING|ERROR) +", "", line) for line in service.log if request_id in line]


def assert_match(lines: list[str], patterns: list[str]) -> None:
    assert len(lines) == len(patterns), lines
    for line, pattern in zip(lines, patterns, strict=True):
        assert re.fullmatch(pattern, line), (line, pattern)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "prefix"), [("chat/completions", "Chat Completions"), ("completions", "Completions")])
async def test_lines_of_a_request(nats_server: NatsServer, path: str, prefix: str, stream: bool) -> None:
    async with running(nats_server) as stack:
        content = {"prompt": "[[tokens=3]]"} if path == "completions" else {"messages": [_user("[[tokens=3]]")]}
        response = await stack.http.post(
            f"{stack.apis[0].url}/v1/{path}", json={"model": MODEL, "stream": stream, **content}
        )
        request_id = response.headers["x-request-id"]
        await idle(stack)
        await stack.workers[0].logged(f"{request_id} completed")
        await stack.apis[0].logged(f"{request_id} completed")
        assert_match(
            lines_about(stack.apis[0], request_id),
            [
                rf"\[{prefix}\] {request_id} received for {MODEL_PATTERN}",
                rf"\[RequestQueue\] {request_id} queued for {MODEL_PATTERN} at 1",
                rf"\[{prefix}\] {request_id} completed in \d\.\d{{3}} s: 1 \+ 3 tokens, attempt 1",
            ],
        )
        assert_match(
            lines_about(stack.workers[0], request_id),
            [
                rf"\[RequestQueue\] {request_id} processing, attempt 1",
                rf"\[RequestQueue\] {request_id} completed after \d\.\d{{3}} s, attempt 1",
            ],
        )


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


async def test_lines_of_bad_ends(nats_server: NatsServer) -> None:
    async with running(nats_server, max_deliveries=1, request_timeout=3, max_queue_size=1) as stack:
        api, worker = stack.apis[0], stack.workers[0]
        failed = (await stack.chat("[[fail]]")).headers["x-request-id"]
        await idle(stack)
        slow = asyncio.create_task(stack.chat("[[tokens=1000 delay_ms=50]]"))
        timed_out = (await api.logged(r"(\S+) queued for \S+ at 2$"))[1]
        full = (await stack.chat("hi")).headers["x-request-id"]
        await slow
        await idle(stack)
        leaving = asyncio.create_task(stack.chat("[[tokens=1000 delay_ms=50]]"))
        cancelled = (await api.logged(r"(\S+) queued for \S+ at 3$"))[1]
        await stack.reaches(cancelled, RequestStatus.PROCESSING)
        leaving.cancel()
        await stack.reaches(cancelled, RequestStatus.CANCELLED)
        await idle(stack)
        unknown = (await stack.chat("hi", model="none-such")).headers["x-request-id"]

        await worker.logged(rf"\[RequestQueue\] {failed} attempt 1 failed: the simulated engine was ordered to fail$")
        await worker.logged(rf"\[RequestQueue\] {failed} failed after \S+ s, attempt 1: the generation failed$")
        await api.logged(rf"\[RequestQueue\] {failed} answered 500 inference_failed$")
        await api.logged(rf"\[RequestQueue\] {timed_out} answered 408 request_timeout$")
        await api.logged(rf"\[RequestQueue\] {full} answered 503 queue_full$")
        await api.logged(rf"\[RequestQueue\] {unknown} answered 404 model_not_found$")
        for request_id, outcome in ((timed_out, "timed out"), (cancelled, "cancelled")):
            # By the one that wrote the state.
            await first_to_log(rf"\[RequestQueue\] {request_id} {outcome}", api, worker)
        # One line an end: each request's total in the counters has its line.
        for service in (api, worker):
            lines = await service.whole_log()
            assert not [line for line in lines if f"{full} queued" in line or "Traceback" in line]


async def test_queue_lines(nats_server: NatsServer) -> None:
    async with running(nats_server) as stack:
        api, worker = stack.apis[0], stack.workers[0]
        await api.logged(r"\[RequestQueue\] topology: stream INFERENCE made$")
        await api.logged(rf"\[RequestQueue\] topology: consumer HuggingFaceTB-{MODEL} made$")
        await api.logged(rf"\[RequestQueue\] api {api.id} takes requests for {MODEL_PATTERN}$")
        await worker.logged(rf"\[RequestQueue\] worker {worker.id} serves {MODEL_PATTERN} \(none, none\) with 1 slots$")
        await asyncio.to_thread(nats_server.restart)
        for service in (api, worker):
            await service.logged(r"\[RequestQueue\] connected to NATS again$")
            lost = [line for line in service.log if "connection to NATS lost" in line]
            assert len(lost) == 1
            assert "[RequestQueue]" in lost[0]


@pytest.mark.parametrize(("log_format", "log_level"), [("text", "DEBUG"), ("json", "DEBUG")])
async def test_no_prompt_and_no_key_in_any_line(nats_server: NatsServer, log_format: str, log_level: str) -> None:
    settings = {"log_format": log_format, "log_level": log_level, "api_keys": KEY, "max_deliveries": 1}
    async with running(nats_server, max_request_bytes=2000, request_timeout=1, **settings) as stack:
        await _everything_that_can_happen(stack)
        for service in (*stack.apis, *stack.workers):
            log = await service.whole_log()
            assert len(log) > 5
            for secret in (PROMPT, KEY, WRONG_KEY, "t0 t1"):
                assert not [line for line in log if secret in line]
            if log_format == "json":
                for line in log:
                    record = json.loads(line)
                    assert list(record)[:4] == ["time", "level", "logger", "message"]
                    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", record["time"])
                    assert record["level"] in ("DEBUG", "INFO", "WARNING", "ERROR")


async def _everything_that_can_happen(stack: Stack) -> None:
    url = f"{stack.apis[0].url}/v1"
    right = {"authorization": f"Bearer {KEY}"}
    chat: dict[str, Any] = {"model": MODEL, "messages": [_user(f"{PROMPT} [[tokens=3]]")]}
    for body in (
        chat,
        chat | {"stream": True},
        chat | {"messages": [_user(f"{PROMPT} [[tokens=2 fail]]")]},
        chat | {"messages": [_user(f"{PROMPT} [[tokens=2 fail]]")], "stream": True},
        chat | {"messages": [_user(f"{PROMPT} [[tokens=90 delay_ms=50]]")]},
        chat | {"messages": [{"role": PROMPT, "content": PROMPT}]},
        chat | {"messages": [_user(PROMPT)], "temperature": PROMPT},
        chat | {"messages": [_user(PROMPT * 1000)]},
    ):
        await stack.http.post(f"{url}/chat/completions", json=body, headers=right)
    await stack.http.post(f"{url}/chat/completions", content=f'{{"model": "{PROMPT}', headers=right)
    await stack.http.post(f"{url}/completions", json={"model": MODEL, "prompt": PROMPT}, headers=right)
    for key in (WRONG_KEY, f"{KEY}{KEY}"):
        await stack.http.post(f"{url}/chat/completions", json=chat, headers={"authorization": f"Bearer {key}"})
    await stack.http.get(f"{url}/models?key={KEY}", headers=right)
    await stack.http.get(f"{url}/nowhere?key={KEY}&prompt={PROMPT}", headers=right)
    # A message that no worker can read.
    payload = json.dumps({"id": 5, "messages": PROMPT}).encode()
    subject = f"inference.requests.HuggingFaceTB-{MODEL}.chat"
    await stack.connection.jetstream.publish(subject, payload)
    await stack.workers[0].logged("cannot be read and was removed")
    # A reply that no api can read.
    await stack.connection.client.publish(f"inference.replies.{stack.apis[0].id}.x", PROMPT.encode())
    await stack.apis[0].logged("a reply that cannot be read was dropped")


async def test_log_level_is_obeyed(nats_server: NatsServer) -> None:
    async with running(nats_server, workers=0) as stack:
        worker = Service("forebay_inference", re.compile(""), stack.env(log_level="WARNING"))
        stack.workers.append(worker)
        await worker.launch()
        assert (await stack.chat("hi")).status_code == 200
        await idle(stack)
        assert list(worker.log) == []
