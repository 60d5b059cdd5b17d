"""Trials in which nats-server is killed a moment after requests were delivered."""

import asyncio
import json
import random
from pathlib import Path

import httpx

from forebay_contracts.wire.state import RequestStatus
from support.cluster import Cluster
from support.nats import NatsServer
from support.stack import Stack, running

CLIENTS = 6
TOKENS = 20
DELAY_MS = 10
KILLED_AFTER_S = (0.005, 0.25)
AWAY_S = 0.2

TEXT = " ".join(f"t{token}" for token in range(TOKENS))


async def one_server(trials: int, workers: int, folder: Path, seed: int) -> None:
    """Kill the only server. Raises AssertionError if a client lost anything, or what is told of it differs."""
    server = NatsServer(folder / "nats")
    server.start()
    try:
        async with running(server, workers=workers, max_concurrent_requests=8, worker_slots=8 // workers) as stack:
            await _trials(stack, [server], trials, random.Random(seed))
    finally:
        server.stop()


async def three_servers(trials: int, workers: int, folder: Path, seed: int) -> None:
    """The same with a cluster, of which all servers are killed at once, or one."""
    cluster = await Cluster(folder).start()
    limits = {"max_concurrent_requests": 8, "worker_slots": 8 // workers, "admission_patience": 30, "nats_replicas": 3}
    try:
        async with running(cluster, workers=workers, **limits) as stack:
            await _trials(stack, cluster.servers, trials, random.Random(seed))
    finally:
        await cluster.stop()


async def _trials(stack: Stack, servers: list[NatsServer], trials: int, moments: random.Random) -> None:
    got: dict[str, str] = {}
    for number in range(trials):
        victims = [moments.choice(servers)] if number % 2 else servers
        got |= await _trial(stack, victims, moments.uniform(*KILLED_AFTER_S))
    wrong = {request_id: text for request_id, text in got.items() if text != TEXT}
    assert not wrong, wrong
    await stack.idle()
    await stack.all_reach(list(got), RequestStatus.COMPLETED)
    status = await stack.status()
    assert status["total_processed"] == len(got) == CLIENTS * trials
    assert (status["total_failed"], status["total_cancelled"], status["total_timed_out"]) == (0, 0, 0)


async def _trial(stack: Stack, victims: list[NatsServer], killed_after_s: float) -> dict[str, str]:
    """One kill; what each client got, by request id."""
    asked = [asyncio.create_task(_ask(stack, number)) for number in range(CLIENTS)]
    await asyncio.sleep(killed_after_s)
    await asyncio.gather(*(asyncio.to_thread(server.kill) for server in victims))
    await asyncio.sleep(AWAY_S)
    await asyncio.gather(*(asyncio.to_thread(server.start) for server in victims))
    return dict(await asyncio.gather(*asked))


async def _ask(stack: Stack, number: int) -> tuple[str, str]:
    """Ask, streamed every other time; the request's id and the text that its client got."""
    answer = await stack.chat(f"[[tokens={TOKENS} delay_ms={DELAY_MS}]]", stream=bool(number % 2))
    return answer.headers["x-request-id"], text_of(answer)


def text_of(answer: httpx.Response) -> str:
    """The text of a whole or streamed chat; the body as it is if there is an error in it."""
    if answer.status_code != 200:
        return answer.text
    if answer.headers["content-type"].startswith("application/json"):
        return str(answer.json()["choices"][0]["message"]["content"])
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    if events[-1] != "[DONE]":
        return answer.text
    choices = [json.loads(event)["choices"][0] for event in events[:-1]]
    return "".join(choice["delta"].get("content") or "" for choice in choices)
