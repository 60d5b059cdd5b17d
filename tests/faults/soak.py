"""`make soak`: the long fault scenarios, each with its goal, as a table. Exits 1 where a goal was missed.

Names of scenarios given as arguments run only those. The figures are of the machine it runs on.
"""

import asyncio
import functools
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from forebay_contracts.nats.streams import DUPLICATE_WINDOW_S
from forebay_contracts.wire.state import RequestStatus
from support import killed_broker
from support.attack import KINDS, LARGE, STREAMS, attacked
from support.chaos import CLIENTS
from support.chaos import chaos as mixed_faults
from support.cluster import Cluster
from support.nats import NatsServer
from support.service import ForkServer, Service, fresh
from support.stack import MODEL, Stack, data_dir, running

ACK_WAIT_S = 2
SOAK_REQUESTS = 100_000
SOAK_CLIENTS = 64
SOAK_SLICE_S = 3
SOAK_STATE_TTL_S = 60
SOAK_WARM_UP_S = 30 + max(SOAK_STATE_TTL_S, DUPLICATE_WINDOW_S)
"""NATS remembers each request so long, by its state or its message id: until then its memory has to grow."""


@dataclass
class Row:
    """One line of the table; `kept` says whether the goal was reached."""

    fault: str
    load: str
    goal: str
    result: str
    kept: bool


def text(tokens: int) -> str:
    return " ".join(f"t{token}" for token in range(tokens))


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(int(len(values) * share), len(values) - 1)]


async def stream(stack: Stack, order: str, api: int = 0, **fields: object) -> tuple[str, float]:
    """A streamed chat's text, and the longest pause between two pieces of it, in seconds."""
    body = {"model": MODEL, "stream": True, "messages": [{"role": "user", "content": order}], **fields}
    pieces: list[str] = []
    longest, last, finished = 0.0, None, False
    async with stack.http.stream("POST", f"{stack.apis[api].url}/v1/chat/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                finished = True
            elif line.startswith("data: "):
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(event["error"]["message"])
                if piece := event["choices"][0]["delta"].get("content"):
                    now = time.monotonic()
                    longest = max(longest, now - (last or now))
                    last = now
                    pieces.append(piece)
    if not finished:
        raise RuntimeError("the stream broke off")
    return "".join(pieces), longest


async def kill_every_second(stack: Stack, stop: asyncio.Event) -> int:
    """Kill the oldest worker and start another, once a second; how many were killed."""
    killed = 0
    while not stop.is_set():
        began = time.monotonic()
        victim = stack.workers.pop(0)
        await victim.kill()
        killed += 1
        await stack.worker()
        await asyncio.sleep(max(0, 1 - (time.monotonic() - began)))
    return killed


async def workers_killed(nats: NatsServer) -> Row:
    seconds, tokens, clients = 30, 20, 200
    limits = {"max_concurrent_requests": 200, "worker_slots": 100, "max_queue_size": 1000, "max_deliveries": 100}
    async with running(nats, workers=3, ack_wait=ACK_WAIT_S, **limits) as stack:
        stop = asyncio.Event()
        pauses: list[float] = []
        outcomes: Counter[str] = Counter()

        async def client() -> None:
            while not stop.is_set():
                try:
                    got, pause = await stream(stack, f"[[tokens={tokens} delay_ms=50]]")
                except (RuntimeError, httpx.HTTPError) as exc:
                    outcomes[f"failed: {exc!r}"] += 1
                    continue
                outcomes["exact" if got == text(tokens) else "lost or doubled"] += 1
                pauses.append(pause)

        chaos = asyncio.create_task(kill_every_second(stack, stop))
        clients_running = [asyncio.create_task(client()) for _ in range(clients)]
        await asyncio.sleep(seconds)
        stop.set()
        killed = await chaos
        await asyncio.gather(*clients_running)
    p99 = percentile(pauses, 0.99)
    return Row(
        f"a worker killed every second, 3 workers, {seconds} s ({killed} killed)",
        f"{clients} concurrent streams, simulated engine",
        f"every text exact; pause p99 ≤ {ACK_WAIT_S + 1} s",
        f"{dict(outcomes)}; pause p99 {p99:.2f} s",
        set(outcomes) == {"exact"} and p99 <= ACK_WAIT_S + 1,
    )


async def real_workers_killed(nats: NatsServer) -> Row:
    streams, tokens = 8, 60
    real = {
        "inference_engine": "transformers",
        "model_quantization": "none",
        "data_dir": data_dir(),
        "max_concurrent_requests": streams,
        "request_timeout": 300,
        "max_deliveries": 20,
    }
    questions = [f"Write a short story about the number {n}." for n in range(streams)]
    async with running(nats, workers=1, ack_wait=ACK_WAIT_S, **real) as stack:

        async def all_of_them() -> list[str]:
            asked = (stream(stack, question, temperature=0, max_tokens=tokens) for question in questions)
            return [got for got, _ in await asyncio.gather(*asked)]

        undisturbed = await all_of_them()
        second = await stack.worker()
        disturbed = asyncio.create_task(all_of_them())
        killed = 0
        victims: list[Service] = [stack.workers[0], second]
        for victim in victims:
            await asyncio.sleep(3)
            if disturbed.done():
                break
            await stack.worker()
            await victim.kill()
            killed += 1
        same = sum(a == b for a, b in zip(undisturbed, await disturbed, strict=True))
    return Row(
        f"the same with the real model at temperature 0 ({killed} killed)",
        f"{streams} streams of {tokens} tokens",
        "text equal to the undisturbed run's",
        f"{same} of {streams} equal",
        same == streams and killed > 0,
    )


async def api_killed(nats: NatsServer) -> Row:
    async with running(nats, apis=2, ack_wait=ACK_WAIT_S, max_concurrent_requests=20, max_queue_size=200) as stack:
        tasks = [asyncio.create_task(stream(stack, "[[tokens=100000 delay_ms=100]]")) for _ in range(100)]
        await stack.taken(100)
        await stack.apis[0].kill()
        died = time.monotonic()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (await stack.chat("[[tokens=1]]", api=1)).status_code == 200
        free_s = time.monotonic() - died
        await stack.idle(api=1)
        bucket = await stack.connection.jetstream.key_value("inference-requests")
        states = [await stack.state(key) for key in await bucket.keys()]
        final = Counter(state.status.value for state in states if state is not None)
    return Row(
        "api killed",
        "100 waiting and running",
        "all reach a final state; slots free within 5 s",
        f"{dict(final)}; a slot was free after {free_s:.1f} s",
        final == {"cancelled": 100, "completed": 1} and free_s <= 5,
    )


async def nats_restarted(nats: NatsServer) -> Row:
    async with running(nats, max_concurrent_requests=16, max_queue_size=1000, request_timeout=120) as stack:
        tasks = [asyncio.create_task(stack.chat("[[tokens=3 delay_ms=20]]")) for _ in range(1000)]
        await stack.taken(900)
        await asyncio.to_thread(nats.restart)
        answers = Counter(answer.status_code for answer in await asyncio.gather(*tasks))
        await stack.idle()
        status = await stack.status()
    totals = {name: status[f"total_{name}"] for name in ("queued", "processed", "failed")}
    return Row(
        "nats-server restarted",
        "1,000 queued",
        "0 lost, totals exact",
        f"answers {dict(answers)}; totals {totals}",
        answers == {200: 1000} and totals == {"queued": 1000, "processed": 1000, "failed": 0},
    )


async def leader_killed(_: NatsServer) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        cluster = await Cluster(Path(folder)).start()
        limits = {"max_concurrent_requests": 64, "max_queue_size": 1000, "request_timeout": 120}
        try:
            async with running(cluster, nats_replicas=3, **limits) as stack:
                tasks = []
                for _ in range(2):
                    tasks += [asyncio.create_task(stack.chat("[[tokens=5 delay_ms=20]]")) for _ in range(250)]
                    await stack.taken(len(tasks) - 50)
                    info = await stack.connection.jetstream._api_request("$JS.API.STREAM.INFO.INFERENCE", timeout=5)
                    victim = cluster.by_name(info["cluster"]["leader"])
                    await asyncio.to_thread(victim.kill)
                    await asyncio.gather(*tasks)
                    await asyncio.to_thread(victim.start)
                answers = [task.result() for task in tasks]
                right = sum(
                    answer.status_code == 200 and answer.json()["choices"][0]["message"]["content"] == text(5)
                    for answer in answers
                )
                await stack.idle()
                processed = (await stack.status())["total_processed"]
        finally:
            await cluster.stop()
    return Row(
        "leader of three killed, twice",
        "500 in flight",
        "0 lost, 0 doubled",
        f"{right} of {len(answers)} right, {processed} processed",
        right == processed == 500,
    )


async def chaos(nats: NatsServer) -> Row:
    seconds = 600
    server = ForkServer()  # only it can set the clock of a process, and what begins soon leaves more time for faults
    Service.starter = staticmethod(server.forked)
    try:
        made, disagree = await mixed_faults(nats, seconds)
    finally:
        server.stop()
        Service.starter = staticmethod(fresh)
    for line in disagree:
        print(line, file=sys.stderr)
    ends = Counter("wrong" if end.startswith("wrong") else end for end in made.ends.values()) + made.nameless
    faults = ", ".join(f"{fault.replace('_', ' ')} {count}" for fault, count in sorted(made.faults.items()))
    return Row(
        f"mixed faults for {seconds} s: {faults}",
        f"{CLIENTS} clients; the clocks of two of three workers 10 min ahead and behind",
        "0 wrong, 0 hanging; client, state and counter agree for every request",
        f"{dict(ends)}; {len(disagree)} disagree; {made.unconfirmed} confirmed in an outage by an api that died in it",
        not disagree and not ends["wrong"] + ends["hanging"],
    )


async def killed_brokers(_: NatsServer) -> Row:
    trials, kept = 60, 0
    for variant in (killed_broker.one_server, killed_broker.three_servers):
        for workers in (1, 2):
            with tempfile.TemporaryDirectory() as folder:
                await variant(trials, workers, Path(folder), seed=workers)
            kept += trials
    return Row(
        "nats-server killed 5 to 250 ms after requests were sent, back 0.2 s later",
        f"{killed_broker.CLIENTS} clients; one and two workers; one server, one or all of three; {trials} trials each",
        "every answer whole; client, state and counter agree",
        f"{kept} of {4 * trials} trials",
        kept == 4 * trials,
    )


async def clients_leave(nats: NatsServer) -> Row:
    waits: list[float] = []
    async with running(nats, max_concurrent_requests=1, max_queue_size=10) as stack:
        url = f"{stack.apis[0].url}/v1/chat/completions"
        for number in range(200):
            body = {"model": MODEL, "stream": bool(number % 2)}
            body["messages"] = [{"role": "user", "content": "[[tokens=100000 delay_ms=20]]"}]
            async with httpx.AsyncClient() as leaving:
                task = asyncio.create_task(leaving.post(url, json=body, timeout=60))
                sequence = 2 * number + 1
                await stack.taken(sequence, RequestStatus.PROCESSING)
                waiting = asyncio.create_task(stack.chat("[[tokens=1]]"))
                await stack.taken(sequence + 1)
                left = time.monotonic()
                task.cancel()
            assert (await waiting).status_code == 200
            waits.append(time.monotonic() - left)
        await stack.idle()
        status = await stack.status()
    p99 = percentile(waits, 0.99) * 1000
    return Row(
        "client disconnects",
        "200, one slot, another client waiting for it",
        "slot free p99 ≤ 500 ms; nothing left",
        f"the waiting one answered p99 {p99:.0f} ms later; {status['active_requests']} left, "
        f"{status['total_cancelled']} cancelled",
        p99 <= 500 and status["active_requests"] == 0 and status["total_cancelled"] == 200,
    )


async def bodies_sent(nats: NatsServer, at_once: int = 10, size: int = LARGE) -> Row:
    async with running(nats, max_concurrent_requests=2 * STREAMS, max_queue_size=500) as stack:
        felt = await attacked(stack, KINDS, at_once, size)
    return Row(
        f"bodies of {size // 1000} KB, as costly as can be: {len(KINDS)} kinds, {at_once} at once",
        f"{STREAMS} streams of another client",
        "every text exact; /health/live ≤ 250 ms; pause ≤ 500 ms",
        f"{len(felt.wrong)} of {felt.answers} wrong; "
        f"/health/live {felt.health_s * 1000:.0f} ms; pause {felt.token_s * 1000:.0f} ms",
        not felt.wrong and felt.health_s <= 0.25 and felt.token_s <= 0.5,
    )


async def soak(nats: NatsServer) -> Row:
    limits = {"max_concurrent_requests": 64, "max_queue_size": 1000}
    async with running(nats, request_state_ttl=SOAK_STATE_TTL_S, **limits) as stack:
        processes = {
            "api": psutil.Process(stack.apis[0].pid),
            "worker": psutil.Process(stack.workers[0].pid),
            "nats": psutil.Process(nats.pid),
        }
        memory: dict[str, list[int]] = {name: [] for name in processes}
        driver = str(Path(__file__).parents[1] / "benchmarks" / "driver.py")
        sent = refused = warmed_up = 0
        began = time.monotonic()
        while sent - warmed_up < SOAK_REQUESTS:
            command = (driver, str(stack.apis[0].port), str(SOAK_CLIENTS), str(SOAK_SLICE_S))
            load = await asyncio.create_subprocess_exec(sys.executable, *command, stdout=asyncio.subprocess.PIPE)
            figures = json.loads((await load.communicate())[0])
            sent += figures["requests"]
            refused += figures["not_200"]
            if time.monotonic() - began < SOAK_WARM_UP_S:
                warmed_up = sent
                continue
            for name, process in processes.items():
                memory[name].append(process.memory_info().rss)
        took_s = time.monotonic() - began
        await stack.idle()
        status = await stack.status()
    tenth = max(len(memory["api"]) // 10, 1)
    growth = {name: sum(values[-tenth:]) / sum(values[tenth : 2 * tenth]) - 1 for name, values in memory.items()}
    totals = (status["total_queued"], status["total_processed"], status["total_failed"])
    shown = ", ".join(f"{name} {memory[name][-1] / 2**20:.0f} MiB ({share:+.1%})" for name, share in growth.items())
    return Row(
        "soak",
        f"{sent:,} requests in {took_s:.0f} s, the last {sent - warmed_up:,} of them after a warm-up; "
        f"REQUEST_STATE_TTL={SOAK_STATE_TTL_S}",
        "memory flat (last tenth within 5 % of the second); stream empty; totals exact",
        f"{shown}; {status['active_requests']} left; queued, processed, failed {totals}",
        refused == 0
        and all(share <= 0.05 for share in growth.values())
        and totals == (sent, sent, 0)
        and status["active_requests"] == 0,
    )


SCENARIOS: dict[str, Callable[[NatsServer], Awaitable[Row]]] = {
    "workers": workers_killed,
    "real": real_workers_killed,
    "api": api_killed,
    "nats": nats_restarted,
    "leader": leader_killed,
    "broker": killed_brokers,
    "chaos": chaos,
    "clients": clients_leave,
    "bodies": bodies_sent,
    "many bodies": functools.partial(bodies_sent, at_once=100, size=60_000),
    "soak": soak,
}


async def main(chosen: list[str]) -> int:
    """Run the scenarios one after the other, each on a NATS of its own."""
    print("| fault | load | goal | result | |\n| --- | --- | --- | --- | --- |")
    kept = True
    for name in chosen or SCENARIOS:
        with tempfile.TemporaryDirectory() as folder:
            nats = NatsServer(Path(folder) / "nats")
            nats.start()
            try:
                row = await SCENARIOS[name](nats)
            finally:
                nats.stop()
        kept &= row.kept
        cells = (row.fault, row.load, row.goal, row.result, "kept" if row.kept else "**missed**")
        print(f"| {' | '.join(cells)} |", flush=True)
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main(sys.argv[1:])))
