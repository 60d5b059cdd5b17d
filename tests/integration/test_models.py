"""Several models behind one queue: names, aliases, and what a client sees of a model without a worker."""

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import openai
import pytest

from forebay_contracts.nats.presence import Heartbeat
from forebay_contracts.version import VERSION
from forebay_contracts.wire import names
from forebay_contracts.wire.heartbeats import WorkerInfo, WorkerStatus
from forebay_contracts.wire.request import CompletionType
from forebay_contracts.wire.state import RequestStatus
from support.answers import error_of, summary, user
from support.nats import NatsServer
from support.service import Service
from support.stack import MODEL, Stack, running
from support.view import stream_state

DEFAULT = f"HuggingFaceTB/{MODEL}"


async def models(stack: Stack) -> dict[str, dict[str, Any]]:
    """`GET /v1/models`, by name."""
    answer = await stack.http.get(f"{stack.apis[0].url}/v1/models")
    assert answer.status_code == 200, answer.text
    return {model["id"]: model for model in answer.json()["data"]}


async def sees(stack: Stack, condition: Callable[[dict[str, dict[str, Any]]], bool]) -> dict[str, dict[str, Any]]:
    """Wait until the api's list of models is as wanted: a heartbeat that was heard leaves no event to wait for."""
    async with asyncio.timeout(60):
        while True:
            found = await models(stack)
            if condition(found):
                return found
            await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def heartbeat_of(stack: Stack, worker: str, **fields: Any) -> AsyncIterator[Callable[..., None]]:
    """The heartbeat of a worker in a state that passes too fast in a simulated one; call it to change fields."""

    def describe() -> WorkerInfo:
        given = {"model": DEFAULT, "status": WorkerStatus.LOADING, "slots": 1, "engine": "transformers", **fields}
        return WorkerInfo(id=worker, version=VERSION, started_at=time.time(), heartbeat_at=time.time(), **given)

    heartbeat = Heartbeat(stack.connection, names.WORKERS_BUCKET, describe)

    def change(**new: Any) -> None:
        fields.update(new)
        heartbeat.beat()

    await heartbeat.start()
    try:
        yield change
    finally:
        await heartbeat.stop()


async def answered_by(stack: Stack, model: str, worker: Service, full_name: str) -> None:
    response = await stack.chat("[[tokens=2]]", model=model)
    assert response.status_code == 200, response.text
    assert response.json()["model"] == full_name
    state = await stack.reaches(response.headers["x-request-id"], RequestStatus.COMPLETED)
    assert (state.worker, state.model) == (worker.id, full_name)


async def test_each_name_reaches_its_worker(nats_server: NatsServer) -> None:
    async with running(nats_server, workers=0) as stack:
        small = await stack.worker(
            model_name="org/small", model_aliases="little, both", model_adapters="red=any, blue=any"
        )
        large = await stack.worker(model_name="org/large", model_aliases="small, both")
        await sees(stack, lambda found: {"org/small", "org/large"} <= found.keys())
        for name in ("org/small", "little"):
            await answered_by(stack, name, small, "org/small")
        for name in ("org/large", "large"):
            await answered_by(stack, name, large, "org/large")
        # A name of two models means the same one each time.
        assert len({(await stack.chat("hi", model="both")).json()["model"] for _ in range(4)}) == 1
        found = await models(stack)
        assert list(found) == [DEFAULT, "org/large", "org/small", "org/small:red", "org/small:blue"]
        assert {name: model["parent"] for name, model in found.items() if model["parent"]} == {
            "org/small:red": "org/small",
            "org/small:blue": "org/small",
        }
        assert found["org/small"]["aliases"] == ["little", "both", "small"]
        assert found["org/small"]["workers"] == {"loading": 0, "ready": 1, "draining": 0}
        assert found[DEFAULT] | {"aliases": []} == {
            "id": DEFAULT,
            "object": "model",
            "created": 0,
            "owned_by": "forebay",
            "parent": None,
            "status": "no_worker",
            "progress": None,
            "workers": {"loading": 0, "ready": 0, "draining": 0},
            "aliases": [],
            "completion_types": [],
            "context_length": None,
            "quantization": None,
        }

        await adapters_answer(stack)


async def adapters_answer(stack: Stack) -> None:
    """The simulated engine draws `random` tokens by the adapter too."""
    texts = set()
    for name, full_name in (
        ("little", "org/small"),
        ("little:red", "org/small:red"),
        ("org/small:blue", "org/small:blue"),
    ):
        answer = await stack.chat("[[random]]", model=name, seed=1)
        assert (answer.status_code, answer.json()["model"]) == (200, full_name)
        # The queue, the states and the metrics know models alone.
        state = await stack.reaches(answer.headers["x-request-id"], RequestStatus.COMPLETED)
        assert state.model == "org/small"
        texts.add(answer.json()["choices"][0]["message"]["content"])
    assert len(texts) == 3
    assert (await stack.openai().models.retrieve("little:red")).id == "org/small:red"
    for name in ("little:green", "large:red"):
        refused = await stack.chat("hi", model=name)
        assert summary(refused)[:3] == (404, "invalid_request_error", "model_not_found")
    stored = await stack.openai().responses.create(model="little:red", input="hi")
    assert (await stack.openai().responses.retrieve(stored.id)).model == stored.model == "org/small:red"


async def test_a_name_counts_before_an_alias(nats_server: NatsServer) -> None:
    async with running(nats_server, workers=0) as stack:
        await stack.worker(model_name="first", model_aliases="second")
        second = await stack.worker(model_name="second")
        await sees(stack, lambda found: {"first", "second"} <= found.keys())
        await answered_by(stack, "second", second, "second")


async def test_a_request_waits_for_a_worker_of_a_known_model(nats_server: NatsServer) -> None:
    async with running(nats_server, workers=0) as stack:
        adapters = {"model_adapters": "red=any"}
        worker = await stack.worker(model_name="org/passing", model_aliases="moment", **adapters)
        await sees(stack, lambda found: "org/passing" in found)
        assert await worker.stop() == 0
        await sees(stack, lambda found: "org/passing" not in found)
        model = await stack.openai().models.retrieve("moment")
        assert (model.id, (model.model_extra or {})["status"]) == ("org/passing", "no_worker")
        # Nor does an api forget that starts while there is no worker.
        await stack.api()
        waiting = [
            asyncio.create_task(stack.chat("[[tokens=2]]", api=api, model=name))
            for api, name in enumerate(("org/passing", "moment:red"))
        ]
        async with asyncio.timeout(60):
            while (await stack.status())["queue_size"] < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        await stack.worker(model_name="org/passing", **adapters)
        answers = [response.json()["model"] for response in await asyncio.gather(*waiting)]
        assert answers == ["org/passing", "org/passing:red"]


async def test_a_request_that_no_worker_comes_for_times_out(nats_server: NatsServer) -> None:
    async with running(nats_server, workers=0, request_timeout=1) as stack:
        assert summary(await stack.chat("hi")) == (408, "timeout_error", "request_timeout", "false")


async def test_refused_while_there_is_no_worker(nats_server: NatsServer) -> None:
    async with running(nats_server, workers=0, no_worker_policy="refuse") as stack:
        refused = await stack.chat("hi")
        assert summary(refused) == (503, "server_error", "model_unavailable", "true")
        assert error_of(refused)["param"] == "model"
        with pytest.raises(openai.InternalServerError) as caught:
            await stack.openai().chat.completions.create(model=MODEL, messages=user("hi"), stream=True)
        assert (caught.value.status_code, caught.value.code) == (503, "model_unavailable")
        assert summary(await stack.chat("hi", model="nobody's"))[:3] == (
            404,
            "invalid_request_error",
            "model_not_found",
        )
        assert (await stream_state(stack))["last_seq"] == 0

        worker = await stack.worker()
        await sees(stack, lambda found: found[DEFAULT]["status"] == "ready")
        assert (await stack.chat("[[tokens=1]]")).status_code == 200
        assert await worker.stop() == 0
        await sees(stack, lambda found: found[DEFAULT]["status"] == "no_worker")
        assert summary(await stack.chat("hi"))[2] == "model_unavailable"


async def test_a_loading_worker_is_seen_and_waited_for(nats_server: NatsServer) -> None:
    async with (
        running(nats_server, workers=0, no_worker_policy="refuse") as stack,
        heartbeat_of(stack, "w1", progress="loading the weights: 40 %") as change,
    ):
        found = await sees(stack, lambda found: found[DEFAULT]["status"] == "loading")
        assert (found[DEFAULT]["progress"], found[DEFAULT]["context_length"]) == ("loading the weights: 40 %", None)
        ready = (await stack.http.get(f"{stack.apis[0].url}/health/ready")).json()
        assert ready["workers"] == [
            {"id": "w1", "model": DEFAULT, "status": "loading", "progress": "loading the weights: 40 %"}
        ]
        (shown,) = (await forebay_status(stack))["workers"]
        assert (shown["status"], shown["progress"]) == ("loading", "loading the weights: 40 %")

        waiting = asyncio.create_task(stack.chat("[[tokens=1]]"))
        async with asyncio.timeout(60):
            while not (await stack.status())["queue_size"]:  # noqa: ASYNC110
                await asyncio.sleep(0.02)

        # The word of a ready worker counts, whatever the others say.
        await stack.worker()
        assert (await waiting).status_code == 200
        found = await sees(stack, lambda found: found[DEFAULT]["status"] == "ready")
        assert found[DEFAULT]["workers"] == {"loading": 1, "ready": 1, "draining": 0}
        assert (found[DEFAULT]["progress"], found[DEFAULT]["context_length"]) == (None, 1 << 20)
        change(status=WorkerStatus.DRAINING)
        await sees(stack, lambda found: found[DEFAULT]["workers"] == {"loading": 0, "ready": 1, "draining": 1})


async def test_a_worker_that_only_drains_is_no_worker(nats_server: NatsServer) -> None:
    async with (
        running(nats_server, workers=0, no_worker_policy="refuse") as stack,
        heartbeat_of(stack, "w1", status=WorkerStatus.DRAINING),
    ):
        await sees(stack, lambda found: found[DEFAULT]["status"] == "draining")
        assert summary(await stack.chat("hi"))[2] == "model_unavailable"


async def test_what_a_model_does_not_serve_is_refused_by_name(nats_server: NatsServer) -> None:
    async with (
        running(nats_server, workers=0) as stack,
        heartbeat_of(stack, "w1", model="vectors", completion_types=(CompletionType.EMBEDDING,)),
        heartbeat_of(stack, "w2", model="words"),
    ):
        await sees(stack, lambda found: {"vectors", "words"} <= found.keys())
        refused = await stack.chat("hi", model="vectors")
        assert summary(refused)[:3] == (400, "invalid_request_error", "model_not_supported")
        assert error_of(refused)["message"] == "The model `vectors` serves embedding requests, not chat."
        with pytest.raises(openai.BadRequestError) as caught:
            await stack.openai().embeddings.create(model="words", input="hi")
        assert (caught.value.code, caught.value.param) == ("model_not_supported", "model")
        assert "`words` serves chat and completion requests, not embedding" in caught.value.message


async def test_a_worker_whose_model_has_the_token_of_another_does_not_start(nats_server: NatsServer) -> None:
    async with running(nats_server, model_name="org/model") as stack:
        with pytest.raises(AssertionError, match="both become 'org-model' on NATS"):
            await stack.worker(model_name="org.model")
        assert await stack.workers[-1].ended() == 2
        assert (await stack.chat("[[tokens=1]]", model="org/model")).status_code == 200


async def forebay_status(stack: Stack) -> dict[str, Any]:
    """`forebay status --json`."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "forebay_cli", "status", "--json", env=stack.env(), stdout=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(60):
        output, _ = await process.communicate()
    assert process.returncode == 0
    found: dict[str, Any] = json.loads(output)
    return found
