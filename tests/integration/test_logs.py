"""The log lines that the reference document's users look for, each with its request's id, and what is in none."""

import asyncio
import json
import re
from typing import Any

import pytest

from forebay_contracts.wire.state import RequestStatus
from support.nats import NatsServer, flushed
from support.service import Service
from support.stack import MODEL, Stack, running
from support.view import holds, idle

MODEL_PATTERN = re.escape(f"HuggingFaceTB/{MODEL}")
PROMPT = "xyzzy"
KEY = "sk-plugh"
WRONG_KEY = "sk-plover"


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


async def lines_of(service: Service) -> list[str]:
    """All lines of a service, which it ends for, without their time and level."""
    return [re.sub(r"^\S+ \S+ (INFO|WARNING|ERROR) +", "", line) for line in await service.whole_log()]


async def lines_about(service: Service, request_id: str) -> list[str]:
    """Those with a request's id."""
    return [line for line in await lines_of(service) if request_id in line]


def assert_match(lines: list[str], patterns: list[str]) -> None:
    assert len(lines) == len(patterns), lines
    for line, pattern in zip(lines, patterns, strict=True):
        assert re.fullmatch(pattern, line), (line, pattern)


@pytest.mark.parametrize(
    ("path", "prefix", "body", "tokens"),
    [
        ("chat/completions", "Chat Completions", {"messages": [_user("[[tokens=3]]")]}, r"1 \+ 3"),
        ("chat/completions", "Chat Completions", {"messages": [_user("[[tokens=3]]")], "stream": True}, r"1 \+ 3"),
        ("completions", "Completions", {"prompt": "[[tokens=3]]"}, r"1 \+ 3"),
        ("completions", "Completions", {"prompt": "[[tokens=3]]", "stream": True}, r"1 \+ 3"),
        ("embeddings", "Embeddings", {"input": "a b c"}, r"3 \+ 0"),
        ("rerank", "Rerank", {"query": "a", "documents": ["b c"]}, r"3 \+ 0"),
    ],
)
async def test_lines_of_a_request(
    nats_server: NatsServer, path: str, prefix: str, body: dict[str, Any], tokens: str
) -> None:
    async with running(nats_server) as stack:
        response = await stack.http.post(f"{stack.apis[0].url}/v1/{path}", json={"model": MODEL, **body})
        request_id = response.headers["x-request-id"]
        await idle(stack)
        assert_match(
            await lines_about(stack.apis[0], request_id),
            [
                rf"\[{prefix}\] {request_id} received for {MODEL_PATTERN}",
                rf"\[RequestQueue\] {request_id} queued for {MODEL_PATTERN} at 1",
                rf"\[{prefix}\] {request_id} completed in \d\.\d{{3}} s: {tokens} tokens, attempt 1",
            ],
        )
        assert_match(
            await lines_about(stack.workers[0], request_id),
            [
                rf"\[RequestQueue\] {request_id} processing, attempt 1",
                rf"\[RequestQueue\] {request_id} completed after \d\.\d{{3}} s, attempt 1",
            ],
        )


async def test_lines_of_bad_ends(nats_server: NatsServer) -> None:
    async with running(nats_server, max_deliveries=1, request_timeout=3, max_queue_size=1) as stack:
        api, worker = stack.apis[0], stack.workers[0]
        failed = (await stack.chat("[[fail]]")).headers["x-request-id"]
        await idle(stack)
        slow = asyncio.create_task(stack.chat("[[tokens=1000 delay_ms=50]]"))
        timed_out = (await stack.taken(2)).id
        full = (await stack.chat("hi")).headers["x-request-id"]
        await slow
        await idle(stack)
        leaving = asyncio.create_task(stack.chat("[[tokens=1000 delay_ms=50]]"))
        cancelled = (await stack.taken(3, RequestStatus.PROCESSING)).id
        leaving.cancel()
        await stack.reaches(cancelled, RequestStatus.CANCELLED)
        await idle(stack)
        unknown = (await stack.chat("hi", model="none-such")).headers["x-request-id"]

        of_api, of_worker = await lines_of(api), await lines_of(worker)
        assert f"[RequestQueue] {failed} attempt 1 failed: the simulated engine was ordered to fail" in of_worker
        ended = rf"\[RequestQueue\] {failed} failed after \S+ s, attempt 1: the generation failed"
        assert [line for line in of_worker if re.fullmatch(ended, line)]
        for request_id, answer in (
            (failed, "500 inference_failed"),
            (timed_out, "408 request_timeout"),
            (full, "503 queue_full"),
            (unknown, "404 model_not_found"),
        ):
            assert f"[RequestQueue] {request_id} answered {answer}" in of_api
        for request_id, outcome in ((timed_out, "timed out"), (cancelled, "cancelled")):
            # By the one that wrote the state.
            ended = f"[RequestQueue] {request_id} {outcome}"
            assert [line for line in of_api + of_worker if line.startswith(ended)]
        assert not [line for line in of_api + of_worker if f"{full} queued" in line or "Traceback" in line]


async def test_queue_lines(nats_server: NatsServer) -> None:
    async with running(nats_server) as stack:
        api, worker = stack.apis[0], stack.workers[0]
        await asyncio.to_thread(nats_server.restart)
        for service in (api, worker):
            await stack.beats(service)
        of_api, of_worker = await lines_of(api), await lines_of(worker)
        for line in (
            "topology: stream INFERENCE made",
            f"topology: consumer HuggingFaceTB-{MODEL} made",
            f"api {api.id} takes requests for HuggingFaceTB/{MODEL}",
        ):
            assert f"[RequestQueue] {line}" in of_api
        served = f"[RequestQueue] worker {worker.id} serves HuggingFaceTB/{MODEL} (none, none) with 1 slots"
        assert served in of_worker
        for lines in (of_api, of_worker):
            assert "[RequestQueue] connected to NATS again" in lines
            assert len([line for line in lines if line.startswith("[RequestQueue] connection to NATS lost")]) == 1


@pytest.mark.parametrize(("log_format", "log_level"), [("text", "DEBUG"), ("json", "DEBUG")])
async def test_no_prompt_and_no_key_in_any_line(nats_server: NatsServer, log_format: str, log_level: str) -> None:
    settings = {"log_format": log_format, "log_level": log_level, "api_keys": KEY, "max_deliveries": 1}
    async with running(nats_server, max_request_bytes=2000, request_timeout=1, **settings) as stack:
        await _everything_that_can_happen(stack)
        services: list[tuple[Service, str]] = [
            (stack.apis[0], "a reply that cannot be read was dropped"),
            (stack.workers[0], "cannot be read and was removed"),
        ]
        for service, last in services:
            log = await service.whole_log()
            assert [line for line in log if last in line]
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
    await holds(stack, 0)
    # A reply that no api can read; the one to the chat after it comes after it.
    await stack.connection.client.publish(f"inference.replies.{stack.apis[0].id}.x", PROMPT.encode())
    await flushed(stack.connection.client)
    await stack.http.post(f"{url}/chat/completions", json=chat, headers=right)


async def test_log_level_is_obeyed(nats_server: NatsServer) -> None:
    async with running(nats_server, workers=0) as stack:
        worker = await stack.worker(log_level="WARNING")
        assert (await stack.chat("hi")).status_code == 200
        await idle(stack)
        assert await worker.whole_log() == []
