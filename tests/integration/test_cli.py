"""The `forebay` command as a user runs it: real processes, the simulated engine."""

import asyncio
import contextlib
import json
import os
import pty
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from support.nats import NatsServer
from support.stack import MODEL
from support.stack import running as running_stack

FULL_MODEL = f"HuggingFaceTB/{MODEL}"
START_TIMEOUT_S = 60
END_TIMEOUT_S = 30

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(autouse=True, scope="module")
def usual_port_is_taken() -> Iterator[None]:
    """Embedded servers of these tests keep off 4222, where a developer's own may be, or may be looked for."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):
            holder.bind(("127.0.0.1", 4222))
            holder.listen(1)
        yield


@dataclass
class Ended:
    code: int | None
    stdout: str
    stderr: str

    def json(self) -> Any:
        return json.loads(self.stdout)


def environment(data_dir: Path, **settings: object) -> dict[str, str]:
    values = {"DATA_DIR": data_dir, "DRAIN_TIMEOUT": 5, "ACK_WAIT": 2, "COLUMNS": 200} | settings
    return os.environ | {name.upper(): str(value) for name, value in values.items()}


async def launch(*arguments: str, env: dict[str, str], **pipes: Any) -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "forebay_cli", *arguments, env=env, **{"stdout": pipe, "stderr": pipe} | pipes
    )


async def forebay(*arguments: str, data_dir: Path, given: str | None = None, **settings: object) -> Ended:
    """Run a command to its end."""
    process = await launch(*arguments, env=environment(data_dir, **settings), stdin=asyncio.subprocess.PIPE)
    async with asyncio.timeout(START_TIMEOUT_S):
        stdout, stderr = await process.communicate((given or "").encode())
    return Ended(process.returncode, stdout.decode(), stderr.decode())


@dataclass
class Up:
    """A running `forebay up`."""

    process: asyncio.subprocess.Process
    data_dir: Path
    url: str = ""
    stderr: list[str] = field(default_factory=list)

    async def ended(self) -> Ended:
        """Wait for its end; what it said after the ready line."""
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        async with asyncio.timeout(END_TIMEOUT_S):
            stdout, stderr = await asyncio.gather(self.process.stdout.read(), self.process.stderr.read())
            await self.process.wait()
        return Ended(self.process.returncode, stdout.decode(), "".join(self.stderr) + stderr.decode())

    def children(self, name: str = "") -> list[psutil.Process]:
        """The processes below it whose command line holds `name`."""
        below = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in below if name in " ".join(child.cmdline())]

    async def chat(self, text: str, **body: Any) -> httpx.Response:
        messages = [{"role": "user", "content": text}]
        async with httpx.AsyncClient(timeout=120) as client:
            return await client.post(
                f"{self.url}/v1/chat/completions",
                json={"model": MODEL, "messages": messages, **body},
            )


@contextlib.asynccontextmanager
async def up(data_dir: Path, *options: str, **settings: object) -> AsyncIterator[Up]:
    """A `forebay up` that is ready; killed at the end if it still runs."""
    arguments = ("up", "--engine", "simulated", "--port", "0", "--data-dir", str(data_dir), *options)
    process = await launch(*arguments, env=environment(data_dir, **settings))
    running = Up(process, data_dir)
    try:
        assert process.stdout is not None
        async with asyncio.timeout(START_TIMEOUT_S):
            line = (await process.stdout.readline()).decode()
        ready = re.fullmatch(r"ready (http://127\.0\.0\.1:\d+)\n", line)
        if ready is None:
            pytest.fail(f"not ready: {line!r} {(await running.ended()).stderr}")
        running.url = ready[1]
        yield running
    finally:
        if process.returncode is None:
            process.kill()
            await running.ended()


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
async def test_up_answers_and_ends_with_zero(tmp_path: Path, ending: signal.Signals) -> None:
    async with up(tmp_path, "--workers", "2", max_concurrent_requests=2) as running:
        children = running.children()
        assert len(running.children("forebay_inference")) == 2
        answer = await running.chat("[[tokens=3]]")
        assert answer.json()["choices"][0]["message"]["content"] == "t0 t1 t2"
        running.process.send_signal(ending)
        ended = await running.ended()
    assert (ended.code, ended.stdout) == (0, ""), ended.stderr
    assert not [child for child in children if child.is_running()]
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


async def settled(data_dir: Path) -> dict[str, Any]:
    """The status once all requests have ended: an answer reaches its client a moment before it is counted."""
    async with asyncio.timeout(60):
        while True:
            status: dict[str, Any] = (await forebay("status", "--json", data_dir=data_dir)).json()
            if status["active_requests"] == 0:
                return status


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


async def test_two_on_one_data_dir_are_refused(tmp_path: Path) -> None:
    async with up(tmp_path) as running:
        second = await forebay("up", "--port", "0", "--engine", "simulated", data_dir=tmp_path)
        assert second.code == 2
        assert f"`forebay up` already runs on DATA_DIR={tmp_path} (process {running.process.pid})" in second.stderr


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
        running.process.send_signal(signal.SIGINT)
        assert (await running.ended()).code == 0


async def test_without_nats_each_command_says_so(tmp_path: Path, nats_server: NatsServer) -> None:
    nats_server.stop()
    for command in (
        ["status"],
        ["status", "--watch"],
        ["requests"],
        ["requests", "--id", "x", "--json"],
        ["cancel", "x"],
        ["pause", "x"],
        ["resume", "x"],
        ["drain", "x"],
        ["topology", "apply"],
        ["topology", "apply", "--dry-run"],
        ["topology", "show"],
    ):
        ended = await forebay(*command, data_dir=tmp_path, nats_url=nats_server.url)
        assert (ended.code, ended.stdout) == (1, ""), command
        assert ended.stderr.startswith(f"forebay: cannot reach NATS at {nats_server.url}: ")
        assert ended.stderr.count("\n") == 1


async def test_topology_is_applied_and_shown(tmp_path: Path, nats_server: NatsServer) -> None:
    async def run(*command: str, **settings: object) -> Ended:
        return await forebay("topology", *command, data_dir=tmp_path, nats_url=nats_server.url, **settings)

    assert (await run("show")).stderr.startswith("forebay: the topology is not (all) there yet")
    dry = (await run("apply", "--dry-run", "--json")).json()
    assert "stream INFERENCE is not there" in dry["changes"]
    assert (await run("show")).code == 1
    assert "stream INFERENCE made" in (await run("apply")).stdout
    assert (await run("apply")).stdout == "nothing to change\n"
    assert "max_msgs 100 → 7\n" in (await run("apply", "--dry-run", max_queue_size=7)).stdout
    aliases = (await run("apply", "--dry-run", model_aliases="fast")).stdout
    assert "forebay.aliases SmolLM2-135M-Instruct → fast,SmolLM2-135M-Instruct" in aliases
    assert (await run("apply", "--dry-run")).stdout == "nothing to change\n"
    assert (await run("apply", "--json", max_queue_size=7)).json() == {
        "changes": ["stream INFERENCE: max_msgs 100 → 7"],
        "warnings": [],
    }
    shown = (await run("show", "--json")).json()
    assert shown["streams"][0]["name"] == "INFERENCE"
    assert shown["streams"][0]["max_msgs"] == 7
    assert shown["consumers"][0]["model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert shown["consumers"][0]["max_ack_pending"] == 1
    assert "KV_inference-requests" in (await run("show")).stdout


async def test_no_model_is_made_up(tmp_path: Path, nats_server: NatsServer) -> None:
    """A consumer for a model that nobody serves comes from an environment that lacks DEFAULT_MODEL."""

    async def apply(*options: str, **settings: object) -> Ended:
        return await forebay("topology", "apply", *options, data_dir=tmp_path, nats_url=nats_server.url, **settings)

    assert (await apply(default_model="org/one")).code == 0
    refused = await apply(max_queue_size=7)
    assert (refused.code, refused.stdout) == (2, "")
    assert refused.stderr.startswith("forebay: neither DEFAULT_MODEL nor --model is given, and HuggingFaceTB/SmolLM2-")
    assert "(org/one)" in refused.stderr
    assert (await apply("--dry-run")).code == 2
    assert (await apply(default_model="org/two")).stdout == "consumer org-two made\n"
    assert (await apply("--model", "org/three", default_model="org/two")).stdout == "consumer org-three made\n"
    # The aliases of another model than the settings' are not theirs to change.
    assert (await apply("--model", "org/one", default_model="org/two", model_aliases="a")).stdout == (
        "nothing to change\n"
    )
    clash = await apply("--model", "org.one")
    assert clash.code == 2
    assert "both become 'org-one'" in clash.stderr


async def test_status_requests_and_cancel(tmp_path: Path) -> None:
    async with up(tmp_path) as running:
        running_one = asyncio.create_task(running.chat("[[tokens=1000 delay_ms=100]]"))
        while not (status := (await forebay("status", "--json", data_dir=tmp_path)).json())["processing_count"]:
            pass
        assert list(status)[:9] == [
            "queue_size",
            "processing_count",
            "max_concurrent",
            "max_queue_size",
            "total_processed",
            "total_failed",
            "total_queued",
            "active_requests",
            "is_running",
        ]
        assert status["is_running"] is True
        assert [worker["engine"] for worker in status["workers"]] == ["simulated"]
        assert "Workers: 1 of 1 ready" in (await forebay("status", data_dir=tmp_path)).stdout

        (found,) = (await forebay("requests", "--status", "processing", "--json", data_dir=tmp_path)).json()
        assert found["id"] in (await forebay("requests", data_dir=tmp_path)).stdout
        assert (await forebay("requests", "--status", "failed", "--json", data_dir=tmp_path)).json() == []

        called_off = await forebay("cancel", found["id"], "--json", data_dir=tmp_path)
        assert (called_off.code, called_off.json()) == (
            0,
            {"id": found["id"], "cancelled": True, "status": "cancelled"},
        )
        assert (await running_one).status_code == 499
        again = await forebay("cancel", found["id"], data_dir=tmp_path)
        assert again.code == 1
        assert again.stderr == f"forebay: request {found['id']} has ended already: cancelled\n"
        again = await forebay("cancel", found["id"], "--json", data_dir=tmp_path)
        assert (again.code, again.json()) == (1, {"id": found["id"], "cancelled": False, "status": "cancelled"})
        waiting = asyncio.create_task(running.chat("[[tokens=1000 delay_ms=100]]"))
        while not (listed := (await forebay("requests", "--status", "processing", "--json", data_dir=tmp_path)).json()):
            pass
        one = listed[0]["id"]
        assert (await forebay("cancel", one, data_dir=tmp_path)).stdout == f"cancelled {one}\n"
        assert (await waiting).status_code == 499
        for name in ("nobody", "*", "not an id"):
            unknown = await forebay("cancel", name, data_dir=tmp_path)
            assert unknown.code == 1
            assert unknown.stderr.startswith(f"forebay: no request {name} is known: ")


async def test_chat(tmp_path: Path) -> None:
    async with up(tmp_path, api_keys="right,other") as running:
        common: dict[str, Any] = {"data_dir": tmp_path, "api_port": running.url.rsplit(":", 1)[1]}
        once = await forebay("chat", "[[tokens=3]]", "--api-key", "right", **common)
        assert (once.code, once.stdout) == (0, "t0 t1 t2\n")
        # The first of API_KEYS, where none is given.
        talk = await forebay("chat", given="[[tokens=1]]\n[[tokens=2]]\n", api_keys="right", **common)
        assert talk.code == 0
        assert "t0\n" in talk.stdout
        assert "t0 t1\n" in talk.stdout
        wrong = await forebay("chat", "hello", "--api-key", "wrong", **common)
        assert wrong.code == 1
        assert re.fullmatch(r"forebay: invalid_api_key: .*\(HTTP 401; request [0-9a-f-]{36}\)\n", wrong.stderr)
        unknown = await forebay("chat", "hello", "--api-key", "right", "--model", "nope", **common)
        assert re.fullmatch(r"forebay: model_not_found: .*\(HTTP 404; request \S+\)\n", unknown.stderr)

        as_json = (await forebay("chat", "[[tokens=3]]", "--json", "--api-key", "right", **common)).json()
        assert list(as_json) == ["id", "model", "content", "finish_reason", "usage"]
        assert (as_json["model"], as_json["content"], as_json["finish_reason"]) == (FULL_MODEL, "t0 t1 t2", "stop")
        assert as_json["usage"]["completion_tokens"] == 3
        (known,) = (await forebay("requests", "--id", as_json["id"], "--json", data_dir=tmp_path)).json()
        assert known["usage"]["completion_tokens"] == 3

        # What failed can be looked up, before the first token and after it.
        for options in ([], ["--json"]):
            for told in ("[[fail]]", "[[tokens=5 fail]]"):
                failed = await forebay("chat", told, *options, "--api-key", "right", **common)
                assert failed.code == 1
                ids = re.search(r"inference_failed: .*; request (\S+)\)|\(request (\S+)\)", failed.stderr)
                assert ids is not None, failed.stderr
                (known,) = (await forebay("requests", "--id", ids[1] or ids[2], "--json", data_dir=tmp_path)).json()
                assert known["status"] == "failed"


async def test_a_conversation_outlives_the_api(tmp_path: Path, nats_server: NatsServer) -> None:
    async with running_stack(nats_server) as stack:
        api = stack.apis[0]
        talk = await launch(
            "chat",
            *("--base-url", f"{api.url}/v1"),
            env=environment(tmp_path),
            stdin=asyncio.subprocess.PIPE,
        )
        assert talk.stdin is not None
        assert talk.stdout is not None
        assert talk.stderr is not None
        async with asyncio.timeout(START_TIMEOUT_S):
            talk.stdin.write(b"[[tokens=2]]\n")
            assert await talk.stdout.readline() == b"> t0 t1\n"
            await api.stop()
            assert b"talking to" in await talk.stderr.readline()
            talk.stdin.write(b"[[tokens=3]]\n")
            assert b"cannot reach the api at" in await talk.stderr.readline()
            stack.apis[0] = await stack.api(api_port=api.port)
            talk.stdin.write(b"[[tokens=4]]\n")
            assert await talk.stdout.readline() == b"> > t0 t1 t2 t3\n"
            talk.stdin.write_eof()
            await talk.communicate()
        assert talk.returncode == 0


async def test_chat_without_an_api(tmp_path: Path) -> None:
    ended = await forebay("chat", "hello", "--base-url", "http://127.0.0.1:9/v1", data_dir=tmp_path)
    assert ended.code == 1
    assert ended.stderr.startswith("forebay: cannot reach the api at http://127.0.0.1:9/v1: ")
    wrong = await forebay("chat", "hello", "--base-url", "http://127.0.0.1:port/v1", data_dir=tmp_path)
    assert wrong.code == 2
    assert wrong.stderr.startswith("forebay: 'http://127.0.0.1:port/v1' is no address of an api: ")
    assert wrong.stderr.count("\n") == 1
    nothing = await forebay("chat", "--json", data_dir=tmp_path)
    assert (nothing.code, nothing.stderr) == (2, "forebay: --json is for one answer: give a MESSAGE\n")


async def test_a_watch_outlives_nats(tmp_path: Path, nats_server: NatsServer) -> None:
    async with running_stack(nats_server) as stack:
        env = environment(tmp_path, nats_url=nats_server.url)
        watch = await launch("status", "--watch", "--json", env=env)
        assert watch.stdout is not None

        async def until(seen: Callable[[dict[str, Any]], bool]) -> None:
            assert watch.stdout is not None
            async with asyncio.timeout(START_TIMEOUT_S):
                while not seen(json.loads(await watch.stdout.readline())):
                    pass

        def busy(slots: int) -> Callable[[dict[str, Any]], bool]:
            return lambda line: [worker["busy"] for worker in line.get("workers", ())] == [slots]

        await until(busy(0))
        runs = asyncio.create_task(stack.chat("[[tokens=60 delay_ms=100]]"))
        await until(busy(1))
        nats_server.stop()
        await until(lambda line: "error" in line)
        nats_server.start()
        await until(busy(1))
        assert (await runs).status_code == 200
        await until(busy(0))
        watch.send_signal(signal.SIGINT)
        async with asyncio.timeout(END_TIMEOUT_S):
            await watch.communicate()

        # Where there is no terminal, the tables come one after the other.
        plain = await launch("status", "--watch", env=env)
        assert plain.stdout is not None
        async with asyncio.timeout(START_TIMEOUT_S):
            for _ in range(2):
                while stack.workers[0].id.encode() not in await plain.stdout.readline():
                    pass
        plain.send_signal(signal.SIGINT)
        async with asyncio.timeout(END_TIMEOUT_S):
            await plain.communicate()


async def test_a_watch_on_a_terminal_says_why_it_stands_still(tmp_path: Path, nats_server: NatsServer) -> None:
    env = environment(tmp_path, nats_url=nats_server.url, term="xterm", columns=80, lines=24)
    assert (await forebay("topology", "apply", data_dir=tmp_path, nats_url=nats_server.url)).code == 0
    ours, its = pty.openpty()
    watch = await launch("status", "--watch", env=env, stdout=its, stdin=its)
    os.close(its)
    seen = b""

    async def until(text: bytes) -> None:
        """Read what is drawn until `text` is."""
        nonlocal seen
        async with asyncio.timeout(START_TIMEOUT_S):
            while text not in seen:
                seen += await asyncio.to_thread(os.read, ours, 65_536)
        seen = b""

    try:
        await until(b"Workers: 0 of 0 ready")
        nats_server.stop()
        await until(b"NATS did not answer")
        nats_server.start()
        await until(b"\x1b[2K\x1b[1mWorkers: 0 of 0 ready")  # at the top again, where the reason was
    finally:
        watch.kill()
        await watch.communicate()
        os.close(ours)


async def test_version(tmp_path: Path) -> None:
    assert (await forebay("--version", data_dir=tmp_path)).stdout == f"{version('forebay')}\n"


async def test_a_drained_worker_is_no_crash(tmp_path: Path) -> None:
    async with up(tmp_path, "--workers", "2", max_concurrent_requests=2, worker_slots=1) as running:
        workers = (await forebay("status", "--json", data_dir=tmp_path)).json()["workers"]
        drained = await forebay("drain", workers[0]["id"], data_dir=tmp_path)
        assert drained.code == 0, drained.stderr
        assert running.process.stderr is not None
        async with asyncio.timeout(END_TIMEOUT_S):
            while b"has drained and left; the others go on" not in (line := await running.process.stderr.readline()):
                assert line
        assert (await running.chat("[[tokens=2]]")).status_code == 200
        status = (await forebay("status", "--json", data_dir=tmp_path)).json()
        assert [worker["id"] for worker in status["workers"]] == [workers[1]["id"]]
        running.process.send_signal(signal.SIGTERM)
        ended = await running.ended()
    assert ended.code == 0, ended.stderr


async def test_requests_are_filtered(tmp_path: Path) -> None:
    async with up(tmp_path) as running:
        done = (await running.chat("[[tokens=1]]")).headers["x-request-id"]
        failed = (await running.chat("[[fail]]")).headers["x-request-id"]

        async def found(*options: str) -> list[str]:
            listed = await forebay("requests", "--json", *options, data_dir=tmp_path)
            return [request["id"] for request in listed.json()]

        assert await found("--model", "SmolLM2-135M-Instruct") == [failed, done]
        assert await found("--model", "HuggingFaceTB/SmolLM2-135M-Instruct", "--status", "completed") == [done]
        assert await found("--model", "other") == []
        assert await found("--since", "10m") == [failed, done]
        assert await found("--since", "0s") == []
        assert await found("--id", failed) == [failed]
        # Why one given request failed, in one command.
        told = await forebay("requests", "--id", failed, data_dir=tmp_path)
        assert "failed" in told.stdout
        assert "the generation failed" in told.stdout
        (worker,) = (await forebay("status", "--json", data_dir=tmp_path)).json()["workers"]
        assert f"attempt 3 on worker {worker['id']}: the simulated engine was ordered to fail" in told.stdout
        unknown = await forebay("requests", "--id", "no-such", data_dir=tmp_path)
        assert unknown.code == 1
        assert unknown.stderr.startswith("forebay: no request no-such is known: it was refused before it was queued")
        running.process.send_signal(signal.SIGTERM)
        await running.ended()
