"""What the page asks for beside the events: lists, the last minutes and the last hour, and steering."""

import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from forebay_contracts import keys
from forebay_contracts.wire import names
from forebay_contracts.wire.state import RequestState, RequestStatus, Usage
from support.nats import NatsServer
from support.stack import MODEL, Stack, running

ALICE, OPS = (f"fb-{name}-key-of-more-than-sixteen" for name in ("alice", "ops"))


def state(number: int, status: RequestStatus = RequestStatus.COMPLETED, **fields: Any) -> RequestState:
    """A request that was queued `number` seconds ago, and ended now if it did."""
    now = time.time()
    times = {"timestamp": now - number, "queued_at": now - number, "deadline": now + 60}
    ends = {"started_at": now - number / 2, "finished_at": now, "worker": "gpu-1"} if status.final else {}
    given = {"id": f"request-{number}", "status": status, "completion_type": "chat", "model": "org/Qwen", "attempt": 1}
    return RequestState(**{**given, **times, **ends, "key": "alice", **fields})


def client(stack: Stack, key: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=stack.apis[0].url + "/v1/queue/", headers={"authorization": f"Bearer {key}"}, timeout=30
    )


async def listed(asking: httpx.AsyncClient, **query: Any) -> tuple[list[str], int]:
    answer = await asking.get("requests", params=query)
    assert answer.status_code == 200, answer.text
    return [one["id"] for one in answer.json()["data"]], answer.json()["total"]


async def test_what_an_operator_and_a_client_see_and_steer(nats_server: NatsServer, tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(
        "".join(
            keys.written(name, key, max_requests=None, operator=name == "ops")
            for name, key in (("alice", ALICE), ("ops", OPS))
        )
    )
    async with (
        running(nats_server, api_keys_file=file) as stack,
        client(stack, ALICE) as alice,
        client(stack, OPS) as ops,
    ):
        fault = "attempt 1 on worker gpu-1: CUDA out of memory"
        states = [
            *(state(number, usage=Usage(prompt_tokens=3)) for number in range(10, 20)),
            state(30, RequestStatus.QUEUED, key="bob", tier="flex"),
            state(40, RequestStatus.PROCESSING, key="bob", worker="gpu-2", model="Llama"),
            *(state(number, RequestStatus.FAILED, error="it failed", fault=fault) for number in (51, 52)),
        ]
        for one in states:
            await stack.states.write(one, 0)

        # Lists: what fits, in order, a page at a time.
        assert await listed(ops, limit=3) == (["request-10", "request-11", "request-12"], 14)
        assert (await listed(ops, limit=3, offset=12))[0] == ["request-51", "request-52"]
        assert await listed(ops, order="oldest", limit=1) == (["request-52"], 14)
        assert await listed(ops, status=["queued", "processing"]) == (["request-30", "request-40"], 2)
        for query in ({"model": "llam"}, {"worker": "GPU-2"}, {"key": "bob", "status": "processing"}):
            assert await listed(ops, **query) == (["request-40"], 1)
        assert await listed(ops, tier="flex") == (["request-30"], 1)
        assert (await listed(ops, older_s=45))[1] == (await listed(ops, text="out of MEMORY"))[1] == 2
        assert (await listed(ops, newer_s=25))[1] == 10
        counts = (await ops.get("requests", params={"status": "failed"})).json()["counts"]
        assert counts == {"queued": 1, "processing": 1, "completed": 10, "failed": 2, "cancelled": 0, "timed_out": 0}
        # A client sees its own, and not what went wrong inside.
        assert (await listed(alice))[1] == 12
        assert (await listed(alice, key="bob"))[1] == (await listed(alice, text="CUDA"))[1] == 0
        assert (await listed(alice, text="it failed"))[1] == 2
        for odd in ({"limit": 0}, {"offset": -1}, {"status": "x"}, {"older_s": "x"}, {"order": "x"}):
            assert (await ops.get("requests", params=odd)).status_code == 400

        recent = (await ops.get("recent")).json()
        assert recent["causes"] == [
            {"model": "org/Qwen", "worker": "gpu-1", "cause": "CUDA out of memory", "count": 2}
            | {"last_at": recent["causes"][0]["last_at"]}
        ]
        llama, qwen = recent["models"]
        assert (qwen["completed"], qwen["failed"], qwen["retried"]) == (10, 2, 0)
        assert 25 < qwen["wait_p95_s"] < 27
        assert qwen["waiting_s"] >= 30
        assert llama["wait_p95_s"] is None
        assert [one["cause"] for one in (await alice.get("recent")).json()["causes"]] == ["it failed"]

        # Steering: for operators, with the effect at once.
        for order, body in (("pause", {"model": MODEL}), ("resume", {"model": MODEL}), ("drain", {"worker": "w"})):
            refused = await alice.post(order, json=body)
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "steering_not_allowed")
        assert (await ops.post("pause", json={"model": "nobody"})).json()["error"]["code"] == "model_not_found"
        for odd_pause in ({"model": MODEL, "for_s": 0}, {"model": MODEL, "for_s": 10**9}, {}, {"model": ""}):
            assert (await ops.post("pause", json=odd_pause)).status_code == 400
        paused = (await ops.post("pause", json={"model": MODEL, "for_s": 600})).json()
        assert (paused["was_paused"], paused["running"]) == (False, 0)
        (line,) = (await ops.get("status")).json()["models"]
        assert line["paused_until"] == pytest.approx(paused["paused_until"], abs=0.001)
        assert (await ops.post("resume", json={"model": MODEL})).json()["was_paused"] is True
        assert (await ops.get("status")).json()["models"][0]["paused_until"] is None
        for nobody in ("nobody", "a.b", "*"):
            assert (await ops.post("drain", json={"worker": nobody})).json()["error"]["code"] == "worker_not_found"
        assert (await ops.post("drain", json={"worker": stack.workers[0].id})).json()["running"] == 0
        assert await stack.workers[0].ended() == 0

        # The hour: at least the sample with which the api began.
        history = (await ops.get("history")).json()
        assert history["at"]
        assert len(history["waiting"]) == len(history["at"])
        assert (await ops.get("history", params={"after": history["at"][-1] + 1})).json()["at"] == []


async def test_the_answer_so_far_is_for_its_owner(nats_server: NatsServer) -> None:
    async with running(nats_server, api_keys="first,second") as stack, client(stack, "first") as first:
        body = {"model": MODEL, "input": "[[tokens=3]]"}
        created = (await first.post(stack.apis[0].url + "/v1/responses", json=body)).json()
        await stack.reaches(names.request_id(created["id"]), RequestStatus.COMPLETED)
        answer = (await first.get(f"request/{created['id']}/answer")).json()
        assert (answer["status"], answer["texts"]) == ("completed", ["t0 t1 t2"])
        refused = await first.get(f"request/{created['id']}/answer", headers={"authorization": "Bearer second"})
        assert refused.status_code == 404
        live = await first.post(
            stack.apis[0].url + "/v1/completions", json={"model": MODEL, "prompt": "[[tokens=1]]", "max_tokens": 3}
        )
        answer = (await first.get(f"request/{live.headers['x-request-id']}/answer")).json()
        assert answer["texts"] is None
