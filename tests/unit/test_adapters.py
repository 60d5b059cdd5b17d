"""LoRA adapters on their way from the setting to the server, and what refuses them."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from forebay_contracts.settings import InferenceSettings
from forebay_contracts.wire.errors import AdapterNotFound, ConfigurationError, InvalidRequest
from forebay_contracts.wire.request import CompletionType
from forebay_inference.__main__ import build_worker
from forebay_inference.attempt.endings import End, Ended
from forebay_inference.engine.openai import OpenAIModel
from forebay_inference.engine.served.dialect import Served
from forebay_inference.engine.served.http import Http
from forebay_inference.engine.served.llamacpp import LlamaCpp
from forebay_inference.engine.served.vllm import VLLM
from forebay_inference.engine.simulated import SimulatedEngine
from forebay_inference.engine.text.model import TextModel
from forebay_inference.models.adapters import Kind, ensure_adapters
from support.engine import answer, chat, completion, simulated_model
from support.inference_server import InferenceServer, inference_server
from support.lora import RANK, write_lora
from support.twins import request, twins


async def adapted() -> TextModel:
    model = TextModel(SimulatedEngine(["red", "blue"]))
    await model.start(lambda line: None)
    return model


def settings(adapters: dict[str, str], **fields: Any) -> InferenceSettings:
    return InferenceSettings(_env_file=None, model_adapters=adapters, **fields)


async def test_an_adapter_that_the_engine_has_not_is_refused_before_it_answers() -> None:
    model = await adapted()
    for asked in (chat("hi", adapter="green"), completion("hi", adapter="green")):
        with pytest.raises(AdapterNotFound, match="has no adapter `green`"):
            await answer(model, asked)
    with pytest.raises(AdapterNotFound):
        await answer(simulated_model(), chat("hi", adapter="red"))
    embedding = completion("hi", adapter="red").model_copy(update={"completion_type": CompletionType.EMBEDDING})
    with pytest.raises(InvalidRequest, match="not computed with an adapter"):
        await anext((await adapted()).generate(embedding, {}))
    asked = chat("hi", adapter="red")
    with pytest.raises(AdapterNotFound):
        await anext(OpenAIModel(settings({}, inference_engine="openai", engine_url="http://h")).generate(asked, {}))


async def test_a_prompt_is_scored_with_the_adapter() -> None:
    model = await adapted()
    prompt: dict[str, Any] = {"return_prompt": True, "prompt_logprobs": 1}
    found = [
        await answer(model, completion("a b c [[tokens=1]]", adapter=name, **prompt)) for name in ("red", "blue", "red")
    ]
    assert found[0].logprobs == found[2].logprobs != found[1].logprobs


async def test_another_attempt_goes_on_with_the_adapter() -> None:
    texts = {}
    for name in ("red", "blue"):
        async with twins() as system:
            wanted = request(
                "random tokens=8 delay_ms=2", id="one", adapter=name, reply_to="inference.replies.api-1.one"
            )
            first = system.worker("w1", engine=await adapted())
            async with system.dispatcher.submit(wanted) as live:
                await live.started()
                text = "".join(delta.text for delta in await anext(live.deltas()))
                first.running[wanted.id].stop(Ended(End.HANDED_OVER))
                text += "".join([delta.text async for some in live.deltas() for delta in some])
            assert (await system.state(wanted.id)).attempt == 2
        whole = await answer(await adapted(), wanted)
        assert text == whole.text
        texts[name] = text
    assert texts["red"] != texts["blue"]


def test_an_engine_without_adapters_does_not_start_with_some() -> None:
    wanted = settings({"red": "any"}, inference_engine="openai", engine_url="http://h")
    with pytest.raises(ConfigurationError, match="INFERENCE_ENGINE=openai has no LoRA adapters"):
        build_worker(wanted, None)  # type: ignore[arg-type]


def test_adapters_are_files_or_folders(tmp_path: Path) -> None:
    folder = write_lora(tmp_path / "red", 0)
    assert ensured("checkpoint", str(folder)) == folder
    with pytest.raises(ConfigurationError, match=r"^MODEL_ADAPTERS: red=.*no adapter_config.json and no adapter_model"):
        ensured("checkpoint", str(tmp_path))
    gguf = tmp_path / "red.gguf"
    gguf.touch()
    assert ensured("gguf", str(gguf)) == gguf
    with pytest.raises(ConfigurationError, match=r"^MODEL_ADAPTERS: red=/none.gguf: there is no such GGUF file"):
        ensured("gguf", "/none.gguf")


def ensured(kind: Kind, place: str) -> Path:
    return ensure_adapters(settings({"red": place}), kind, lambda line: None)["red"]


@pytest_asyncio.fixture
async def server() -> AsyncIterator[InferenceServer]:
    async with inference_server({}) as started:
        yield started


@pytest_asyncio.fixture
async def http(server: InferenceServer) -> AsyncIterator[Http]:
    asking = Http(server.url)
    yield asking
    await asking.close()


def test_vllm_gets_room_for_the_largest_rank(tmp_path: Path) -> None:
    folders, on_cpu = (
        {name: write_lora(tmp_path / name, 0) for name in ("red", "blue")},
        settings({}, model_device="cpu"),
    )
    words = VLLM().adapter_arguments(on_cpu, folders)
    assert " ".join(words[:7]) == "--enable-lora --max-lora-rank 8 --max-loras 3 --max-cpu-loras 3"
    assert words[7:] == ["--lora-modules", *(f"{name}={folder}" for name, folder in folders.items())]
    config = folders["blue"] / "adapter_config.json"
    config.write_text(json.dumps({"r": RANK, "rank_pattern": {"a": 40}}))
    assert "64" in VLLM().adapter_arguments(on_cpu, folders)
    config.write_text(json.dumps({"r": 1000}))
    with pytest.raises(ConfigurationError, match="rank 512 at most, and one has 1000"):
        VLLM().adapter_arguments(on_cpu, folders)
    config.write_text("{}")
    with pytest.raises(ConfigurationError, match="tells no rank"):
        VLLM().adapter_arguments(on_cpu, folders)


async def test_vllm_s_adapters_have_a_parent(server: InferenceServer, http: Http) -> None:
    server.answers["/v1/models"] = {"data": [{"id": "base", "parent": None}, {"id": "red", "parent": "base"}]}
    fields = await VLLM().adapters(http, {"red": Path("any")}, started=True)
    assert fields == {"": {}, "red": {"model": "red"}}
    # By the name of the model, vLLM would answer without an adapter.
    for name in ("base", "green"):
        with pytest.raises(ConfigurationError, match=f"has no LoRA adapter {name}"):
            await VLLM().adapters(http, {name: Path("any")}, started=True)
    server.answers["/v1/completions"] = {"choices": [{"prompt_logprobs": [None]}]}
    served = Served("1", 100, 100, "none", adapters=fields)
    assert [part async for part in VLLM().score(http, "r", (1,), 0, "red", served)] == [()]
    assert server.asked[-1][1]["model"] == "red"


async def test_llama_cpp_s_adapters_are_known_by_their_files(server: InferenceServer, http: Http) -> None:
    loaded = [{"id": 0, "path": "/a/red.gguf", "scale": 1.0}, {"id": 1, "path": "/b/red.gguf", "scale": 1.0}]
    server.answers["/lora-adapters"] = json.dumps([*loaded, {"id": 2, "path": "blue.gguf"}]).encode()
    fields = await LlamaCpp().adapters(http, {"red": Path("/b/red.gguf")}, started=True)
    # It says of each adapter how much, or the server decides.
    off = [{"id": id, "scale": 0.0} for id in range(3)]
    assert fields == {"": {"lora": off}, "red": {"lora": [off[0], {"id": 1, "scale": 1.0}, off[2]]}}
    server.answers["/lora-adapters"] = json.dumps([loaded[0], {**loaded[0], "id": 3}]).encode()
    twice = await LlamaCpp().adapters(http, {"red": Path("/a/red.gguf"), "same": Path("/a/red.gguf")}, started=True)
    assert twice["red"] == twice["same"] == {"lora": [{"id": 0, "scale": 1.0}, {"id": 3, "scale": 0.0}]}
    server.answers["/lora-adapters"] = json.dumps([*loaded, {"id": 2, "path": "blue.gguf"}]).encode()
    elsewhere = await LlamaCpp().adapters(http, {"blue": Path("org/name/blue.gguf")}, started=False)
    assert elsewhere["blue"] == {"lora": [*off[:2], {"id": 2, "scale": 1.0}], "cache_prompt": False}
    for name, count in (("red.gguf", 2), ("green.gguf", 0)):
        with pytest.raises(ConfigurationError, match=f"has {count} LoRA adapters {name}"):
            await LlamaCpp().adapters(http, {"any": Path("/c") / name}, started=False)
