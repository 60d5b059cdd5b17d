"""NATS is killed a moment after requests were delivered: a broker that forgets deliveries costs nobody an answer."""

import asyncio
import json
import random
from pathlib import Path

import httpx
import pytest

from forebay_contracts.wire.state import RequestStatus
from support.nats import NatsServer
from support.stack import Stack, running

TRIALS = 20
CLIENTS = 6
TOKENS = 20
DELAY_MS = 10
KILLED_AFTER_S = (0.005, 0.25)
AWAY_S = 0.2

TEXT = " ".join(f"t{token}" for token in range(TOKENS))


async def ask(stack: Stack, number: int) -> tuple[str, str]:
    """Ask, streamed every other time; the request's id and the text that its client got."""
    order = f"[[tokens={TOKENS} delay_ms={DELAY_MS}]]"
    answer = await stack.chat(order, stream=bool(number % 2))
    return answer.headers["x-request-id"], text_of(answer)


def text_of(answer: httpx.Response) -> str:
    if answer.status_code != 200:
        return answer.text
    if answer.headers["content-type"].startswith("application/json"):
        return str(answer.json()["choices"][0]["message"]["content"])
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    if events[-1] != "[DONE]":
        return answer.text
    choices = [json.loads(event)["choices"][0] for event in events[:-1]]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


async def trial(stack: Stack, server: NatsServer, killed_after_s: float) -> dict[str, str]:
    """One kill; what each client got, by request id."""
    asked = [asyncio.create_task(ask(stack, number)) for number in range(CLIENTS)]
    await asyncio.sleep(killed_after_s)
    await asyncio.to_thread(server.kill)
    await asyncio.sleep(AWAY_S)
    await asyncio.to_thread(server.start)
    return dict(await asyncio.gather(*asked))


@pytest.mark.timeout(240)
@pytest.mark.parametrize("workers", [1, 2])
async def test_nobody_loses_an_answer_and_all_that_is_told_of_it_agrees(workers: int, tmp_path: Path) -> None:
    moments = random.Random(workers)
    server = NatsServer(tmp_path / "nats")
    server.start()
    try:
        slots = 8 // workers
        async with running(server, workers=workers, max_concurrent_requests=8, worker_slots=slots) as stack:
            got: dict[str, str] = {}
            for _ in range(TRIALS // 2):
                got |= await trial(stack, server, moments.uniform(*KILLED_AFTER_S))
            wrong = {request_id: text for request_id, text in got.items() if text != TEXT}
            assert not wrong
            await stack.idle()
            await stack.all_reach(list(got), RequestStatus.COMPLETED)
            status = await stack.status()
            assert status["total_processed"] == len(got) == CLIENTS * (TRIALS // 2)
            assert (status["total_failed"], status["total_cancelled"], status["total_timed_out"]) == (0, 0, 0)
    finally:
        server.stop()
