"""`forebay up`: what it starts, what of it dies, and how it ends."""

import asyncio
import contextlib
import re
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import psutil
import pytest

from forebay_cli.local.running import exclusive
from support.command import END_TIMEOUT_S, Up, forebay, settled, up
from support.nats import NatsServer
from support.stack import MODEL

pytestmark = [pytest.mark.timeout(180), pytest.mark.usefixtures("usual_port_is_taken")]


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
async def test_up_answers_and_ends_with_zero(tmp_path: Path, ending: signal.Signals) -> None:
    async with up(tmp_path, "--model", "org/one", "--model", "org/two") as running:
        children = running.children()
        assert len(running.children("forebay_inference")) == 2
        for model in ("one", "two"):
            answer = (await running.chat("[[tokens=3]]", model=model)).json()
            assert (answer["model"], answer["choices"][0]["message"]["content"]) == (f"org/{model}", "t0 t1 t2")
        running.process.send_signal(ending)
        ended = await running.ended()
    assert (ended.code, ended.stdout) == (0, ""), ended.stderr
    assert not [child for child in children if child.is_running()]
    # What there is now, and a request to copy.
    assert f"page    {running.url}/\n" in ended.stderr
    assert "models  org/one  (1 worker: simulated)\n          org/two  (1 worker: simulated)\n" in ended.stderr
    assert f"curl {running.url}/v1/chat/completions -H" in ended.stderr
    assert "draining: 0 requests running, 0 waiting; at most " in ended.stderr
    logs = sorted(path.name for path in (tmp_path / "logs").iterdir())
    assert logs == ["api.log", "nats-server.log", "worker-1.log", "worker-2.log"]


async def test_a_running_request_is_answered_before_the_end(tmp_path: Path) -> None:
    async with up(tmp_path) as running:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "[[tokens=20 delay_ms=50]]"}], "stream": True}
        url = f"{running.url}/v1/chat/completions"
        async with httpx.AsyncClient(timeout=60) as client, client.stream("POST", url, json=body) as answer:
            lines = [line async for line in interrupted(answer.aiter_lines(), running)]
        ended = await running.ended()
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert ended.code == 0, ended.stderr


async def interrupted(lines: AsyncIterator[str], running: Up) -> AsyncIterator[str]:
    """The lines of an answer, at the first of which all is told to end."""
    first = await anext(lines)
    running.process.send_signal(signal.SIGINT)
    yield first
    async for line in lines:
        yield line


async def test_totals_and_requests_outlast_a_restart(tmp_path: Path) -> None:
    for total in (1, 2):
        async with up(tmp_path) as running:
            await running.chat("[[tokens=1]]")
            status = await settled(tmp_path)
            assert (status["total_processed"], status["total_queued"]) == (total, total)
            assert len((await forebay("requests", "--json", data_dir=tmp_path)).json()) == total
            running.process.send_signal(signal.SIGTERM)
            assert (await running.ended()).code == 0


@pytest.mark.parametrize("victim", ["forebay_inference", "forebay_api", "nats-server"])
async def test_a_child_that_dies_is_named_and_ends_all(tmp_path: Path, victim: str) -> None:
    async with up(tmp_path) as running:
        children = running.children()
        next(child for child in children if victim in " ".join(child.cmdline())).kill()
        ended = await running.ended()
    name = {"forebay_inference": "worker 1", "forebay_api": "api", "nats-server": "nats-server"}[victim]
    assert ended.code == 1
    assert f"forebay: {name} ended with signal SIGKILL; its last lines (all of them: " in ended.stderr
    assert not [child for child in children if child.is_running()]


async def test_a_crashing_worker_shows_its_exit_code(tmp_path: Path) -> None:
    async with up(tmp_path) as running:
        request = asyncio.create_task(running.chat("[[tokens=1 crash]]"))
        ended = await running.ended()
        with contextlib.suppress(httpx.TransportError):
            await request
    assert ended.code == 1
    assert re.search(r"forebay: worker 1 ended with exit code \d+; its last lines .*\n    \S", ended.stderr)


async def test_no_child_outlives_a_killed_up(tmp_path: Path) -> None:
    async with up(tmp_path) as running:
        children = running.children()
        assert len(children) == 3
        running.process.kill()
        await running.ended()
        _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive


async def test_a_second_interrupt_ends_at_once(tmp_path: Path) -> None:
    async with up(tmp_path, drain_timeout=60) as running:
        request = asyncio.create_task(running.chat("[[tokens=1000 delay_ms=100]]"))
        while not (await forebay("status", "--json", data_dir=tmp_path)).json()["processing_count"]:
            pass
        running.process.send_signal(signal.SIGINT)
        assert running.process.stderr is not None
        while "draining" not in (line := (await running.process.stderr.readline()).decode()):
            running.stderr.append(line)
        running.process.send_signal(signal.SIGINT)
        ended = await running.ended()
        with contextlib.suppress(httpx.TransportError):
            await request
    assert ended.code == 1
    assert line.startswith("draining: 1 request running, 0 waiting; at most 12")
    assert ended.stderr.endswith("\nstopped at once: what ran was cut off\n"), ended.stderr


async def test_two_on_one_data_dir_are_refused(tmp_path: Path) -> None:
    async with up(tmp_path) as running:
        second = await forebay("up", "--port", "0", "--engine", "simulated", data_dir=tmp_path)
        assert second.code == 2
        assert f"`forebay up` already runs on DATA_DIR={tmp_path} (process {running.process.pid})" in second.stderr
        talk = await forebay("run", "org/other", "hi", data_dir=tmp_path)
        assert talk.code == 2
        assert f"serves HuggingFaceTB/{MODEL} and not org/other: stop it and start it with " in talk.error


async def test_a_model_runs_for_a_chat(tmp_path: Path) -> None:
    talk = await forebay("run", "org/one", "[[tokens=2]]", "--engine", "simulated", data_dir=tmp_path, api_port=0)
    assert (talk.code, talk.stdout) == (0, "t0 t1\n"), talk.stderr
    with exclusive(tmp_path):  # nothing of it runs any more
        assert (tmp_path / "logs" / "api.log").exists()


async def test_a_taken_port_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen(1)
        port = holder.getsockname()[1]
        ended = await forebay("up", "--port", str(port), "--engine", "simulated", data_dir=tmp_path / "data")
    assert ended.code == 2
    assert f"the api cannot listen on 127.0.0.1:{port} (address already in use)" in ended.stderr
    assert not (tmp_path / "data").exists()


async def test_a_wrong_configuration_is_one_sentence(tmp_path: Path) -> None:
    ended = await forebay("up", data_dir=tmp_path, max_concurrent_requests=5, max_queue_size=2)
    assert ended.code == 2
    assert ended.stderr.startswith("forebay: MAX_CONCURRENT_REQUESTS=5 cannot be reached with MAX_QUEUE_SIZE=2")
    assert ended.stderr.count("\n") == 1


async def test_an_unknown_engine_is_refused(tmp_path: Path) -> None:
    ended = await forebay("up", "--engine", "steam", data_dir=tmp_path)
    assert ended.code == 2
    assert ended.stderr.startswith("forebay: INFERENCE_ENGINE='steam': Input should be ")


async def test_the_embedded_server_takes_what_the_api_takes(tmp_path: Path) -> None:
    async with up(tmp_path, max_request_bytes=20_000_000) as running:
        answer = await running.chat("x" * 19_000_000 + "[[tokens=1]]")
        assert answer.status_code == 200, answer.text


async def test_up_uses_the_nats_that_it_is_given(tmp_path: Path, nats_server: NatsServer) -> None:
    async with up(tmp_path / "data", nats_url=nats_server.url) as running:
        assert not running.children("nats-server")
        answer = await running.chat("[[tokens=2]]")
        assert answer.status_code == 200
        seen = await forebay("status", "--json", "--data-dir", str(tmp_path / "data"), data_dir=tmp_path)
        assert seen.json()["server"] == nats_server.url
        assert "(`forebay up` on " in seen.stderr
        running.process.send_signal(signal.SIGINT)
        assert (await running.ended()).code == 0


async def test_a_drained_worker_is_no_crash(tmp_path: Path) -> None:
    async with up(tmp_path, "--workers", "2", max_concurrent_requests=2, worker_slots=1) as running:
        workers = (await forebay("status", "--json", data_dir=tmp_path)).json()["workers"]
        drained = await forebay("drain", workers[0]["id"], data_dir=tmp_path)
        assert drained.code == 0, drained.stderr
        async with asyncio.timeout(END_TIMEOUT_S):
            while len(running.children("forebay_inference")) > 1:
                await asyncio.to_thread(psutil.wait_procs, running.children("forebay_inference"), timeout=0.1)
        assert (await running.chat("[[tokens=2]]")).status_code == 200
        status = (await forebay("status", "--json", data_dir=tmp_path)).json()
        assert [worker["id"] for worker in status["workers"]] == [workers[1]["id"]]
        running.process.send_signal(signal.SIGTERM)
        ended = await running.ended()
    assert ended.code == 0, ended.stderr
    assert re.search(r"^worker \d: has drained and exited; the others go on$", ended.stderr, re.MULTILINE)
