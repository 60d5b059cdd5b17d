"""Steering the living system, as an operator does it: `forebay pause`, `resume`, `drain` and `topology apply`."""

import asyncio
import json
import re
import signal
import time
from datetime import datetime
from pathlib import Path

import pytest

from forebay_contracts.wire.state import RequestStatus
from support.command import Ended, run
from support.nats import NatsServer
from support.secured import Site
from support.secured import running as running_secured
from support.stack import MODEL, Stack, running
from support.view import holds, jetstream

CONSUMER = f"HuggingFaceTB-{MODEL}"


async def forebay(stack: Stack, *arguments: str, **settings: object) -> Ended:
    """A command against the stack's NATS, to its end."""
    return await run(*arguments, env=stack.env(**settings))


async def test_a_paused_model_waits_and_goes_on(nats_server: NatsServer) -> None:
    async with running(nats_server, max_concurrent_requests=2, ack_wait=30) as stack:
        runs = asyncio.create_task(stack.chat("[[tokens=25 delay_ms=100]]"))
        await stack.begins()
        stack.workers[0].signal(signal.SIGSTOP)  # it has not ended when the command comes to it
        paused = await forebay(stack, "pause", MODEL)
        assert (paused.code, paused.stdout) == (
            0,
            f"paused HuggingFaceTB/{MODEL} until it is resumed; 1 still run\n",
        ), paused.stderr
        stack.workers[0].signal(signal.SIGCONT)
        waits = asyncio.create_task(stack.chat("[[tokens=2]]"))
        await holds(stack, 2)
        # What ran goes on to its end; what came after is not handed out, though a slot was free all along.
        assert (await runs).status_code == 200
        await holds(stack, 1)
        (line,) = (await stack.status())["models"]
        assert (line["waiting"], line["processing"]) == (1, 0)
        assert line["paused_until"] > time.time() + 365 * 86_400
        assert not waits.done()
        # A changed setting that is applied meanwhile leaves the pause as it is.
        applied = await forebay(stack, "topology", "apply", max_concurrent_requests=3)
        assert f"consumer {CONSUMER}: max_ack_pending 2 → 3\n" in applied.stdout
        assert (await stack.status())["models"][0]["paused_until"]
        resumed = await forebay(stack, "resume", f"HuggingFaceTB/{MODEL}")
        assert (resumed.code, resumed.stdout) == (0, f"resumed HuggingFaceTB/{MODEL}; 1 wait\n")
        assert (await waits).status_code == 200
        assert (await stack.status())["models"][0]["paused_until"] is None
        again = await forebay(stack, "resume", CONSUMER)
        assert (again.code, again.stdout) == (0, f"was not paused: HuggingFaceTB/{MODEL}; 0 wait\n")


async def test_a_pause_ends_by_itself(nats_server: NatsServer) -> None:
    async with running(nats_server) as stack:
        paused = await forebay(stack, "pause", MODEL, "--for", "2s")
        assert re.search(r"until \d{4}-\d\d-\d\d \d\d:\d\d:\d\d; 0 still run", paused.stdout)
        answer = await stack.chat("[[tokens=1]]")
        assert answer.status_code == 200
        config = (await jetstream(stack, f"CONSUMER.INFO.INFERENCE.{CONSUMER}"))["config"]
        until = datetime.fromisoformat(config["pause_until"]).timestamp()
        assert time.time() >= until
        state = await stack.reaches(answer.headers["x-request-id"], RequestStatus.COMPLETED)
        assert state.started_at is not None
        assert state.started_at >= until - 0.05


async def test_steering_answers_in_json(nats_server: NatsServer) -> None:
    async with running(nats_server) as stack:
        paused = json.loads((await forebay(stack, "pause", MODEL, "--for", "1h30m", "--json")).stdout)
        assert paused.pop("paused_until") == pytest.approx(time.time() + 5400, abs=60)
        server = {"server": nats_server.url}
        assert paused == {"model": f"HuggingFaceTB/{MODEL}", "running": 0} | server
        for was in (True, False):
            resumed = json.loads((await forebay(stack, "resume", MODEL, "--json")).stdout)
            assert resumed == {"model": f"HuggingFaceTB/{MODEL}", "was_paused": was, "waiting": 0} | server
        worker = stack.workers[0]
        drained = json.loads((await forebay(stack, "drain", worker.id, "--json")).stdout)
        assert drained == {"worker": worker.id, "running": 0} | server
        assert await worker.ended() == 0


async def test_what_cannot_be_steered_is_said(nats_server: NatsServer) -> None:
    async with running(nats_server) as stack:
        for pause in ("0s", "0h0m", "366d", "9" * 400 + "d"):
            refused = await forebay(stack, "pause", MODEL, "--for", pause)
            assert (refused.code, refused.stdout) == (2, "")
            assert "--for must be above 0s and at most 365d" in refused.stderr
        assert not (await jetstream(stack, f"CONSUMER.INFO.INFERENCE.{CONSUMER}")).get("paused")
        unknown = await forebay(stack, "pause", "nobody")
        assert unknown.code == 1
        assert f"there is no model nobody; known are: HuggingFaceTB/{MODEL}" in unknown.stderr
        wrong = await forebay(stack, "pause", MODEL, "--for", "soon")
        assert wrong.code == 2
        assert "'soon' is no duration: write 90s, 10m, 2h or 1h30m" in wrong.stderr
        for worker in ("nobody", "a.b", "*"):
            nobody = await forebay(stack, "drain", worker)
            assert nobody.code == 1
            assert f"there is no worker {worker}: `forebay status` lists them" in nobody.stderr


async def test_who_may_not_steer_is_told_what_is_missing(tmp_path: Path) -> None:
    site = Site(tmp_path / "site")
    site.server.start()
    try:
        async with running_secured(site) as stack:
            waiting = asyncio.create_task(stack.chat("[[tokens=1000 delay_ms=50]]"))
            await holds(stack, 1)
            (request_id,) = await ids(stack)
            await stack.reaches(request_id, RequestStatus.PROCESSING)
            commands = {
                ("pause", MODEL): f"CONSUMER.PAUSE.INFERENCE.{CONSUMER}",
                ("resume", MODEL): f"CONSUMER.PAUSE.INFERENCE.{CONSUMER}",
                ("drain", stack.workers[0].id): f"inference.drain.{stack.workers[0].id}",
                ("cancel", request_id): f"$KV.inference-requests.{request_id}",
            }
            ended = await asyncio.gather(*(site.forebay("operator", *command) for command in commands))
            for (code, printed), missing in zip(ended, commands.values(), strict=True):
                assert code == 1, printed
                assert printed.count("\n") == 1
                assert printed.startswith(("forebay: the NATS user `", "forebay: this NATS user may not do that"))
                assert missing.lower() in printed.lower()  # nats-py tells it in lower case
                assert "use `admin` of deploy/nats/forebay.conf" in printed
            code, printed = await site.forebay("operator", "topology", "apply", max_queue_size=7)
            assert (code, printed.count("\n")) == (1, 1)
            assert printed.startswith("forebay: this NATS user may not change streams or consumers: use `admin`")
            code, printed = await site.forebay("operator", "topology", "apply", "--dry-run", max_queue_size=7)
            assert (code, printed) == (0, "stream INFERENCE: max_msgs 100 → 7\n")
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
    finally:
        site.server.stop()


async def test_one_worker_is_drained_and_the_other_takes_over(nats_server: NatsServer) -> None:
    async with running(nats_server, workers=2, max_concurrent_requests=2, worker_slots=1) as stack:
        # Longer than the command takes to start on a machine that has other work.
        runs = asyncio.create_task(stack.chat("[[tokens=120 delay_ms=50]]"))
        await holds(stack, 1)
        (request_id,) = await ids(stack)
        state = await stack.reaches(request_id, RequestStatus.PROCESSING)
        busy = next(worker for worker in stack.workers if worker.id == state.worker)
        drained = await forebay(stack, "drain", busy.id)
        assert (drained.code, drained.stdout) == (
            0,
            f"{busy.id} drains: it takes no new requests, finishes 1 and exits\n",
        )
        answer = await runs
        assert (answer.status_code, answer.json()["usage"]["completion_tokens"]) == (200, 120)
        assert await busy.ended() == 0
        status = await stack.status()
        assert (status["workers"], status["is_running"]) == (1, True)
        after = await stack.reaches((await stack.chat("[[tokens=1]]")).headers["x-request-id"], RequestStatus.COMPLETED)
        assert after.worker not in (None, busy.id)
        assert (await stack.reaches(request_id, RequestStatus.COMPLETED)).attempt == 1


async def test_the_limits_are_changed_under_load(nats_server: NatsServer) -> None:
    """A worker that may take more takes more at once; a queue that is made smaller loses nothing."""
    async with running(nats_server, max_concurrent_requests=4, max_queue_size=20) as stack:
        lowered = await forebay(stack, "topology", "apply", max_concurrent_requests=1, max_queue_size=20)
        assert f"consumer {CONSUMER}: max_ack_pending 4 → 1\n" in lowered.stdout
        sent = [asyncio.create_task(stack.chat("[[tokens=60 delay_ms=50]]")) for _ in range(12)]
        await holds(stack, 12)
        await processes(stack, 1)
        raised = await forebay(stack, "topology", "apply", max_concurrent_requests=4, max_queue_size=5)
        assert f"consumer {CONSUMER}: max_ack_pending 1 → 4\n" in raised.stdout
        assert "stream INFERENCE: max_msgs 20 → 5\n" in raised.stdout
        status = await stack.status()
        assert (status["max_concurrent"], status["max_queue_size"]) == (4, 5)
        await processes(stack, 4)
        # More wait than there is room for now: no further one is taken, none of those is lost.
        assert (await stack.chat("[[tokens=1]]")).json()["error"]["code"] == "queue_full"
        assert {answer.status_code for answer in await asyncio.gather(*sent)} == {200}
        assert (await jetstream(stack, "STREAM.INFO.INFERENCE"))["config"]["max_msgs"] == 5


async def test_a_limit_above_the_slots_is_told_and_more_workers_reach_it(nats_server: NatsServer) -> None:
    async with running(nats_server) as stack:
        raised = await forebay(stack, "topology", "apply", max_concurrent_requests=4)
        assert f"consumer {CONSUMER}: max_ack_pending 1 → 4\n" in raised.stdout
        assert (
            f"HuggingFaceTB/{MODEL} may run 4 at once, but its workers have 1 slot in all: "
            "start more, or restart them with the new setting\n"
        ) in raised.stdout
        sent = [asyncio.create_task(stack.chat("[[tokens=2000 delay_ms=50]]")) for _ in range(5)]
        await holds(stack, 5)
        await processes(stack, 1)
        await stack.worker(max_concurrent_requests=4, worker_slots=2)
        await processes(stack, 3)
        told = json.loads((await forebay(stack, "topology", "apply", "--json", max_concurrent_requests=4)).stdout)
        assert told["changes"] == []
        assert "its workers have 3 slots in all" in told["warnings"][0]
        await stack.worker(max_concurrent_requests=4, worker_slots=1)
        await processes(stack, 4)
        again = await forebay(stack, "topology", "apply", max_concurrent_requests=4)
        assert again.stdout == "nothing to change\n"
        for request in sent:
            request.cancel()
        await asyncio.gather(*sent, return_exceptions=True)


async def processes(stack: Stack, count: int) -> None:
    """Wait until so many requests are with workers; which one is handed out leaves no event here."""
    async with asyncio.timeout(60):
        while (await stack.status())["processing_count"] != count:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def ids(stack: Stack) -> list[str]:
    """The ids of the requests that are known."""
    bucket = await stack.connection.jetstream.key_value("inference-requests")
    async with asyncio.timeout(30):
        watcher = await bucket.watchall()
        try:
            async for entry in watcher:
                if entry is not None:
                    return [entry.key]
        finally:
            await watcher.stop()
    return []
