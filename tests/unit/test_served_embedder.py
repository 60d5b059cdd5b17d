"""Vectors of an inference server that is slow, wrong, broken or gone: a fake one, in the dialect of llama.cpp."""

import asyncio
import base64
import contextlib
import json
import math
import struct
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web

from forebay_contracts.settings import InferenceSettings, load
from forebay_contracts.wire.errors import ConfigurationError, InvalidRequest
from forebay_contracts.wire.request import CompletionType
from forebay_inference.__main__ import build_model
from forebay_inference.engine.protocol import EngineFault
from forebay_inference.engine.served import embedder as served_embedder
from forebay_inference.engine.served import server as served_server
from forebay_inference.engine.served.embedder import ServedEmbedder
from forebay_inference.engine.served.pooling import POOLING, LlamaCppPooling
from forebay_inference.engine.served.tokenizer import bare_tokenizer
from forebay_inference.engine.text.model import TextModel
from forebay_inference.health import EngineWatch
from support.embeddings import vectors as vectors_of
from support.fake_llama import Behaviour, FakeLlama
from support.twins import request, twins


def embedder_at(url: str, model: Path, **settings: Any) -> ServedEmbedder:
    given = {"default_model": str(model), "engine_url": url, "max_concurrent_requests": 4, **settings}
    return ServedEmbedder(InferenceSettings(_env_file=None, **given), LlamaCppPooling("embed"))


@pytest_asyncio.fixture
async def embedder(
    request: pytest.FixtureRequest, llama: FakeLlama, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[ServedEmbedder]:
    monkeypatch.setattr(served_server, "_LOOK_S", 0.02)
    started = embedder_at(llama.url, tiny_gguf, engine_stall_timeout=getattr(request, "param", 30))
    loaded = await started.start(lambda line: None)
    assert (loaded.dimensions, loaded.context_length, loaded.prefix) == (2, 512, "")
    llama.requests.clear()
    yield started
    await started.close()


async def vectors(embedder: ServedEmbedder, inputs: dict[int, list[int]], dimensions: int | None = None) -> Any:
    return {place: struct.unpack("<2f", values) async for place, values in embedder.embed(inputs, dimensions)}


async def comes(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_each_input_gets_its_vector_in_parts(llama: FakeLlama, embedder: ServedEmbedder) -> None:
    inputs = {place: [place, 1] for place in range(5, 155)} | {3: [3] * 16_000, 4: [4] * 600}
    assert await vectors(embedder, inputs) == {place: (place, len(ids)) for place, ids in inputs.items()}
    assert [len(body["input"]) for body in llama.requests] == [64, 64, 23, 1]
    assert embedder.status()[:3] == (None, 0, 4)
    assert not any("dimensions" in body for body in llama.requests)
    await vectors(embedder, {0: [1]}, 2)  # what it has anyway
    assert "dimensions" not in llama.requests[-1]
    llama.behaviours.append(lambda response: writes(response, {"data": [{"index": 0, "embedding": [1.0]}]}))
    assert [values async for values in embedder.embed({0: [1]}, 1)] == [(0, struct.pack("<f", 1))]
    assert llama.requests[-1]["dimensions"] == 1


async def writes(response: web.StreamResponse, answer: Any) -> None:
    await response.write(json.dumps(answer).encode())


BROKEN: dict[str, Any] = {
    "no JSON": "nonsense",
    "no vectors": {"data": []},
    "a vector of another": {"data": [{"index": 1, "embedding": [1.0]}]},
    "no number": {"data": [{"index": 0, "embedding": [None]}]},
    "no base64": {"data": [{"index": 0, "embedding": "?"}]},
    "half a number": {"data": [{"index": 0, "embedding": base64.b64encode(b"abc").decode()}]},
    "nothing": {"data": [{"index": 0, "embedding": []}]},
    "one too many": {"data": [{"index": 0, "embedding": [1.0, 2.0]}, {"index": 0, "embedding": [3.0, 4.0]}]},
}


@pytest.mark.parametrize("answer", BROKEN.values(), ids=BROKEN.keys())
async def test_a_broken_answer_is_a_fault_of_its_request_alone(
    llama: FakeLlama, embedder: ServedEmbedder, answer: Any
) -> None:
    llama.behaviours.append(lambda response: writes(response, answer))
    with pytest.raises(EngineFault, match="/v1/embeddings"):
        await vectors(embedder, {0: [1]})
    assert embedder.status()[:2] == (None, 0)
    assert await vectors(embedder, {0: [7]}) == {0: (7, 1)}


@pytest.mark.parametrize("number", [math.nan, math.inf])
async def test_a_number_that_json_does_not_have_is_a_fault(llama: FakeLlama, tiny_gguf: Path, number: float) -> None:
    text = TextModel(embedder_at(llama.url, tiny_gguf))
    await text.start(lambda line: None)
    data = [{"index": 0, "embedding": base64.b64encode(struct.pack("<2f", 1.0, number)).decode()}]
    llama.behaviours.append(lambda response: writes(response, {"data": data}))
    with pytest.raises(EngineFault, match="not finite"):
        await vectors_of(text, (5,))
    assert text.status().fault is None
    await text.close()


async def test_what_the_server_refuses_is_the_request_s_own_fault(llama: FakeLlama, embedder: ServedEmbedder) -> None:
    llama.statuses["/v1/embeddings"] = 400
    for dimensions, param in ((None, "input"), (9, "dimensions")):
        with pytest.raises(InvalidRequest, match="The engine refuses the request: no") as caught:
            await vectors(embedder, {0: [1]}, dimensions)
        assert caught.value.param == param
    llama.statuses["/v1/embeddings"] = 500
    with pytest.raises(EngineFault, match="status 500"):
        await vectors(embedder, {0: [1]})
    assert embedder.status()[:2] == (None, 0)


async def test_closing_the_generator_closes_the_connection(llama: FakeLlama, embedder: ServedEmbedder) -> None:
    llama.delay_s = 60
    running = asyncio.create_task(vectors(embedder, {0: [1], 1: [2]}))
    await comes(lambda: embedder.status().sequences == 2 and bool(llama.requests))
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    assert embedder.status().sequences == 0
    await comes(lambda: llama.closed == 1)


@pytest.mark.parametrize("embedder", [1], indirect=True)
async def test_a_server_that_hangs_is_found(llama: FakeLlama, embedder: ServedEmbedder) -> None:
    llama.delay_s = 60
    running = asyncio.create_task(vectors(embedder, {0: [1]}))
    await comes(lambda: embedder.status().sequences == 1)
    watch = EngineWatch(TextModel(embedder), stall_timeout_s=2)
    for _ in range(3):
        assert watch.fault() is None
        watch.look()
    assert "no step in 2 s" in str(watch.fault())
    running.cancel()
    llama.steps = None
    await comes(lambda: "llama.cpp has not answered for 1 s" in str(embedder.status().fault))


async def test_another_vector_takes_over_where_a_killed_server_ended(tiny_gguf: Path) -> None:
    inputs = tuple((place, 1) for place in range(200))
    async with twins() as system, contextlib.AsyncExitStack() as stack:
        fakes = []
        for name in ("w1", "w2"):
            fake = await stack.enter_async_context(FakeLlama(bare_tokenizer(tiny_gguf)).running())
            text = TextModel(embedder_at(fake.url, tiny_gguf))
            await text.start(lambda line: None)
            stack.push_async_callback(text.close)
            fake.requests.clear()
            system.worker(name, slots=1, engine=text)
            fakes.append(fake)
        second: asyncio.Event = asyncio.Event()

        async def asked(response: web.StreamResponse) -> None:
            second.set()
            await asyncio.Event().wait()

        def first_part(fake: FakeLlama) -> Behaviour:
            async def answer(response: web.StreamResponse) -> None:
                fake.behaviours.append(asked)
                data = [{"index": place, "embedding": [place, 2]} for place in range(64)]
                await response.write(json.dumps({"data": data}).encode())

            return answer

        for fake in fakes:
            fake.behaviours.append(first_part(fake))
        wanted = request(completion_type=CompletionType.EMBEDDING, prompts=inputs, stream=False, messages=())
        assert text.can_resume(wanted)
        async with system.dispatcher.submit(wanted) as answer:
            await second.wait()
            (killed,) = [fake for fake in fakes if fake.requests]
            (other,) = [fake for fake in fakes if not fake.requests]
            other.behaviours.clear()
            await killed.kill()
            deltas = [delta async for some in answer.deltas() for delta in some]
        found = {one.index: struct.unpack("<2f", base64.b64decode(one.embedding)) for one in deltas if one.embedding}
        assert found == {place: (place, 2) for place in range(200)}
        assert (await system.state(wanted.id)).attempt == 2
        # The part that the client had is not computed again.
        assert [len(body["input"]) for body in other.requests] == [64, 64, 8]


async def test_what_does_not_embed_is_refused(llama: FakeLlama, tiny_gguf: Path) -> None:
    llama.statuses["/v1/embeddings"] = 404
    for said in ("cannot serve .* status 404", "another tokenizer"):
        embedder = embedder_at(llama.url, tiny_gguf, engine_start_timeout=1)
        with pytest.raises(ConfigurationError, match=said):
            await embedder.start(lambda line: None)
        await embedder.close()

        class Other:
            def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
                return [1]

        llama.tokenizer = Other()  # type: ignore[assignment]


def test_what_a_checkpoint_tells(tmp_path: Path) -> None:
    assert not served_embedder._can_be_cut(tmp_path)
    assert served_embedder._prefix(tmp_path) == ""
    (tmp_path / "config.json").write_text('{"matryoshka_dimensions": [128]}')
    told = {"prompts": {"query": "search_query: ", "other": ""}, "default_prompt_name": "query"}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(told))
    assert served_embedder._can_be_cut(tmp_path)
    assert served_embedder._prefix(tmp_path) == "search_query: "


@pytest.mark.parametrize("engine", POOLING)
def test_a_task_decides_what_is_served(engine: Any) -> None:
    given: dict[str, Any] = {"inference_engine": engine, "engine_url": "http://h", "_env_file": None}
    assert build_model(InferenceSettings(**given, model_task="embed")).completion_types == (CompletionType.EMBEDDING,)
    assert CompletionType.EMBEDDING not in build_model(InferenceSettings(**given)).completion_types
    command = POOLING[engine]("embed").command(InferenceSettings(**given))
    assert {"--embedding", "--runner", "--is-embedding"} & set(command)


@pytest.mark.parametrize(
    "given",
    [
        {"inference_engine": "transformers", "model_task": "embed"},
        {"inference_engine": "embedding", "model_task": "generate"},
        {"inference_engine": "vllm", "model_task": "embed", "model_adapters": "a=b"},
    ],
)
def test_an_engine_without_the_task_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="MODEL_TASK"):
        load(InferenceSettings, **given)
