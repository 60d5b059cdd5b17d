"""Mixed faults for minutes under a hundred clients, and whether all that is told of each request agrees.

Workers, apis and nats-server are killed, stopped (SIGSTOP), drained and restarted at random moments, and the clocks of
two of the three workers are ten minutes wrong.
"""

import asyncio
import contextlib
import json
import math
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field

import httpx

from forebay_contracts.queueing.recent_requests import recent_states
from forebay_contracts.queueing.reply_channel import CONFIRM_TIMEOUT_S
from forebay_contracts.queueing.state_store import OUTCOMES
from forebay_contracts.wire.state import RequestStatus
from support.nats import NatsServer
from support.service import Api, Service, Worker
from support.stack import MODEL, Stack, running

CLIENTS = 100
CLOCKS_AHEAD_S = (0, 600, -600)
APIS = 2
REQUEST_TIMEOUT_S = 60
HANGING_S = REQUEST_TIMEOUT_S + 30
"""A client that has heard nothing for so long hangs: its api may have been stopped in between."""

RESTART_S = 0.5
"""Pause before a service is started again, as by a service manager."""

CONFIRMED_S = 0.5
"""A confirmation is on its way for so long at most: a busy process may not have read it."""

ASKED_AGAIN_S = CONFIRM_TIMEOUT_S + 1
"""A worker whose question was lost asks again within this time."""

ACK_WAIT_S = 2
STOPPED_S = (0.5, 8)
AWAY_S = (0.1, 2)
LIMITS = {
    "max_concurrent_requests": 100,
    "worker_slots": 40,
    "max_queue_size": 1000,
    "max_deliveries": 100,
    "request_timeout": REQUEST_TIMEOUT_S,
    "ack_wait": ACK_WAIT_S,
}

ALLOWED = {
    "whole": {RequestStatus.COMPLETED},
    "request_timeout": {RequestStatus.TIMED_OUT},
    "request_cancelled": {RequestStatus.CANCELLED},
    "inference_failed": {RequestStatus.FAILED},
    # Stored after all, or not.
    "queue_unavailable": {RequestStatus.CANCELLED, None},
    "queue_full": {None},
    # The api was killed. It may have had the whole answer and not yet written it to its client.
    "broken": {RequestStatus.CANCELLED, RequestStatus.COMPLETED},
}
"""For each end that a client saw, the states that agree with it."""


@dataclass
class Chaos:
    """What happened: the end of each request by its id, those whose client was told no id, and the faults.

    `outages` are the times in which NATS was away, a worker stood still, or nobody had the message of a killed one yet,
    and `died` is when an api was killed (monotonic seconds). `unconfirmed` counts the whole answers with the state
    `cancelled` of which nobody was left who knew: their api confirmed them in an outage, and was killed before it was
    over and a worker had asked again.
    """

    stack: Stack
    nats: NatsServer
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    ends: dict[str, str] = field(default_factory=dict)
    nameless: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    served: dict[str, tuple[Api, float]] = field(default_factory=dict)
    outages: list[tuple[float, float]] = field(default_factory=list)
    died: dict[Api, float] = field(default_factory=dict)
    unconfirmed: int = 0

    async def client(self, number: int) -> None:
        """Ask one request after another, streamed every other time."""
        while not self.stop.is_set():
            tokens = random.randint(5, 60)
            request_id: list[str] = []
            try:
                async with asyncio.timeout(HANGING_S):
                    end = await self._ask(tokens, stream=bool(number % 2), told=request_id)
            except httpx.ConnectError:
                await asyncio.sleep(RESTART_S)  # no api has it
                continue
            except httpx.TransportError:
                end = "broken"
            except TimeoutError:
                end = "hanging"
            number += 1
            if request_id:
                self.ends[request_id[0]] = end
            else:
                self.nameless[end] += 1

    async def _ask(self, tokens: int, *, stream: bool, told: list[str]) -> str:
        order = {"role": "user", "content": f"[[tokens={tokens} delay_ms=40]]"}
        body = {"model": MODEL, "stream": stream, "messages": [order]}
        api = random.choice(self.stack.apis)
        url = f"{api.url}/v1/chat/completions"
        headers = {"Forebay-Stream": "early"}
        text, finished = "", False
        async with self.stack.http.stream("POST", url, json=body, headers=headers, timeout=None) as answer:
            told.append(answer.headers["x-request-id"])
            if answer.status_code != 200:
                return str(json.loads(await answer.aread())["error"]["code"])
            if not stream:
                text, finished = json.loads(await answer.aread())["choices"][0]["message"]["content"], True
            else:
                async for line in answer.aiter_lines():
                    if not line.startswith("data: ") or (finished := line == "data: [DONE]"):
                        continue
                    event = json.loads(line[6:])
                    if "error" in event:
                        return str(event["error"]["code"])
                    text += event["choices"][0]["delta"].get("content") or ""
        self.served[told[0]] = api, time.monotonic()
        whole = " ".join(f"t{token}" for token in range(tokens))
        return "whole" if finished and text == whole else f"wrong: {text!r} of {tokens}"

    async def fault(self, pause_s: tuple[float, float], *faults: Callable[[], Awaitable[None]]) -> None:
        """One of `faults` after the other, until it is enough."""
        while not self.stop.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(random.uniform(*pause_s)):
                    await self.stop.wait()
                    return
            chosen = random.choice(faults)
            self.faults[chosen.__name__] += 1
            await chosen()

    async def worker_killed(self) -> None:
        began = time.monotonic()
        self.outages.append((began, began + ACK_WAIT_S))
        await self._replaced_worker(Service.kill)

    async def worker_drained(self) -> None:
        await self._replaced_worker(Service.stop)

    async def worker_stopped(self) -> None:
        with self._outage():
            await stopped(random.choice(self.stack.workers))

    async def api_killed(self) -> None:
        victim = self.stack.apis.pop(0)
        self.died[victim] = time.monotonic()
        await victim.kill()
        await started(self.stack.apis, self.stack.api)

    async def api_stopped(self) -> None:
        await stopped(random.choice(self.stack.apis))

    async def nats_killed(self) -> None:
        with self._outage():
            await asyncio.to_thread(self.nats.kill)
            await asyncio.sleep(random.uniform(*AWAY_S))
            await asyncio.to_thread(self.nats.start)

    async def nats_restarted(self) -> None:
        with self._outage():
            await asyncio.to_thread(self.nats.restart)

    async def nats_stopped(self) -> None:
        with self._outage():
            await stopped(self.nats)

    @contextlib.contextmanager
    def _outage(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.outages.append((began, time.monotonic()))

    async def _replaced_worker(self, end: Callable[[Service], Awaitable[object]]) -> None:
        victim = self.stack.workers.pop(random.randrange(len(self.stack.workers)))
        await end(victim)
        ahead_s = victim.env.get("CLOCK_AHEAD_S", "0")
        await started(self.stack.workers, lambda: self.stack.worker(clock_ahead_s=float(ahead_s)))

    async def disagreements(self) -> list[str]:
        """Every request of which its client, its state and the counters do not say the same."""
        states = {state.id: state.status for state in await recent_states(self.stack.connection, 10**9)}
        found = []
        for request_id, end in self.ends.items():
            state = states.get(request_id)
            if (end, state) == ("whole", RequestStatus.CANCELLED) and self._nobody_knew(request_id):
                self.unconfirmed += 1
            elif state not in ALLOWED.get(end, ()):
                found.append(f"{request_id}: client {end}, state {state}")
        # A client that waits for a whole answer is told no id before, so its broken request has a state without client.
        unnamed = {request_id: status for request_id, status in states.items() if request_id not in self.ends}
        found += [f"{key}: no client, {status}" for key, status in unnamed.items() if status not in ALLOWED["broken"]]
        if len(unnamed) > self.nameless["broken"] or set(self.nameless) - {"broken"}:
            found.append(f"{len(unnamed)} states without a client, {dict(self.nameless)} clients without an id")
        stored, totals = Counter(states.values()), await self.stack.states.totals()
        found += [
            f"{outcome.value}: {stored[outcome]} states, {totals[outcome]} counted"
            for outcome in OUTCOMES
            if stored[outcome] != totals[outcome]
        ]
        return found

    def _nobody_knew(self, request_id: str) -> bool:
        api, ended_at = self.served[request_id]
        died_at = self.died.get(api, math.inf)
        unasked_until = ended_at
        for began, back in sorted(self.outages):  # one may begin before the other is over
            if began - CONFIRMED_S < unasked_until < back:
                unasked_until = back
        return ended_at < unasked_until and died_at < unasked_until + ASKED_AGAIN_S


async def stopped(service: Service | NatsServer) -> None:
    """Stop a process for a while."""
    service.signal(signal.SIGSTOP)
    await asyncio.sleep(random.uniform(*STOPPED_S))
    service.signal(signal.SIGCONT)


async def started(services: list[Api] | list[Worker], start: Callable[[], Awaitable[Service]]) -> None:
    """Start a service until it is there: without NATS it ends at once."""
    while True:
        try:
            await start()
            return
        except AssertionError:
            await services.pop().kill()
            await asyncio.sleep(RESTART_S)


async def chaos(nats: NatsServer, seconds: float) -> tuple[Chaos, list[str]]:
    """Have faults for so long; what happened, and what does not agree."""
    async with running(nats, apis=APIS, workers=0, **LIMITS) as stack:
        for ahead_s in CLOCKS_AHEAD_S:
            await stack.worker(clock_ahead_s=ahead_s)
        made = Chaos(stack, nats)
        faults = [
            made.fault((1, 5), made.worker_killed, made.worker_stopped, made.worker_drained),
            made.fault((5, 15), made.api_killed, made.api_stopped),
            made.fault((3, 12), made.nats_killed, made.nats_stopped, made.nats_restarted),
        ]
        works = [asyncio.create_task(work) for work in (*faults, *map(made.client, range(CLIENTS)))]
        await asyncio.wait(works, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
        made.stop.set()
        await asyncio.gather(*works)
        await stack.idle(timeout_s=HANGING_S)
        return made, await made.disagreements()
