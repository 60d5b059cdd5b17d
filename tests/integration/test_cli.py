"""The commands that look at the queue, steer it and talk to it."""

import asyncio
import re
import signal
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from support.command import START_TIMEOUT_S, Ended, environment, forebay, launch, up
from support.nats import NatsServer
from support.stack import MODEL
from support.stack import running as running_stack

FULL_MODEL = f"HuggingFaceTB/{MODEL}"
pytestmark = [pytest.mark.timeout(180), pytest.mark.usefixtures("usual_port_is_taken")]


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

    assert (await run("show")).error.startswith("forebay: the topology is not complete yet")
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
        "server": nats_server.url,
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
    assert refused.error.startswith("forebay: neither DEFAULT_MODEL nor --model is given, and HuggingFaceTB/SmolLM2-")
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

        url = (tmp_path / "nats" / "url").read_text().strip()
        called_off = await forebay("cancel", found["id"], "--json", data_dir=tmp_path)
        assert (called_off.code, called_off.json()) == (
            0,
            {"id": found["id"], "cancelled": True, "status": "cancelled", "server": url},
        )
        assert (await running_one).status_code == 499
        again = await forebay("cancel", found["id"], data_dir=tmp_path)
        assert again.code == 1
        assert again.error == f"forebay: request {found['id']} has ended already: cancelled\n"
        again = await forebay("cancel", found["id"], "--json", data_dir=tmp_path)
        assert (again.code, again.json()) == (
            1,
            {"id": found["id"], "cancelled": False, "status": "cancelled", "server": url},
        )
        waiting = asyncio.create_task(running.chat("[[tokens=1000 delay_ms=100]]"))
        while not (listed := (await forebay("requests", "--status", "processing", "--json", data_dir=tmp_path)).json()):
            pass
        one = listed[0]["id"]
        assert (await forebay("cancel", one, data_dir=tmp_path)).stdout == f"cancelled {one}\n"
        assert (await waiting).status_code == 499
        for name in ("nobody", "*", "not an id"):
            unknown = await forebay("cancel", name, data_dir=tmp_path)
            assert unknown.code == 1
            assert unknown.error.startswith(f"forebay: no request {name} is known: ")


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
        assert re.fullmatch(r"forebay: invalid_api_key: .*\(HTTP 401; request [0-9a-f-]{36}\)\n", wrong.error)
        unknown = await forebay("chat", "hello", "--api-key", "right", "--model", "nope", **common)
        assert re.fullmatch(r"forebay: model_not_found: .*\(HTTP 404; request \S+\)\n", unknown.error)

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
            *("--base-url", api.url),  # as `up` prints it
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
            assert await talk.stderr.readline() == f"server: {api.url} (--base-url)\n".encode()
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
    assert ended.error.startswith("forebay: cannot reach the api at http://127.0.0.1:9/v1: ")
    wrong = await forebay("chat", "hello", "--base-url", "http://127.0.0.1:port/v1", data_dir=tmp_path)
    assert wrong.code == 2
    assert wrong.stderr.startswith("forebay: 'http://127.0.0.1:port/v1' is no address of an api: ")
    assert wrong.stderr.count("\n") == 1
    nothing = await forebay("chat", "--json", data_dir=tmp_path)
    assert (nothing.code, nothing.stderr) == (2, "forebay: --json is for one answer: give a MESSAGE\n")


async def test_version(tmp_path: Path) -> None:
    assert (await forebay("--version", data_dir=tmp_path)).stdout == f"{version('forebay')}\n"


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
        assert unknown.error.startswith("forebay: no request no-such is known: it was refused before it was queued")
        running.process.send_signal(signal.SIGTERM)
        await running.ended()
