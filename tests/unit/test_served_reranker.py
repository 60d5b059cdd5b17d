"""Scores of an inference server that is slow, wrong, broken or gone: a fake one, in the dialect of llama.cpp."""

import asyncio
import contextlib
import json
import math
import struct
from base64 import b64decode
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web

from forebay_contracts.settings import InferenceSettings
from forebay_contracts.wire.errors import ConfigurationError, InvalidRequest
from forebay_contracts.wire.heartbeats import WorkerInfo
from forebay_contracts.wire.request import CompletionType
from forebay_inference.__main__ import build_model
from forebay_inference.engine.protocol import EngineFault
from forebay_inference.engine.served import gguf_head
from forebay_inference.engine.served import reranker as served_reranker
from forebay_inference.engine.served.embedder import ServedEmbedder
from forebay_inference.engine.served.gguf_head import Head
from forebay_inference.engine.served.http import Http, ServerFailed
from forebay_inference.engine.served.pooling import POOLING, LlamaCppPooling, refused
from forebay_inference.engine.served.reranker import ServedReranker
from forebay_inference.engine.served.tokenizer import bare_tokenizer
from forebay_inference.engine.text.model import TextModel
from support.embeddings import scores as scores_of
from support.fake_llama import FakeLlama
from support.inference_server import inference_server
from support.twins import request, twins


def reranker_at(url: str, model: Path, **settings: Any) -> ServedReranker:
    given = {"default_model": str(model), "engine_url": url, "max_concurrent_requests": 4, **settings}
    return ServedReranker(InferenceSettings(_env_file=None, **given), LlamaCppPooling("rerank"))


@pytest_asyncio.fixture
async def reranker(llama: FakeLlama, tiny_ranker: Path) -> AsyncIterator[ServedReranker]:
    started = reranker_at(llama.url, tiny_ranker)
    await started.start(lambda line: None)
    llama.requests.clear()
    yield started
    await started.close()


async def scores(reranker: ServedReranker, query: str, documents: dict[int, str]) -> tuple[dict[int, float], int]:
    found, tokens = {}, 0
    async for part, taken in reranker.rerank(query, documents):
        assert not found.keys() & part.keys()
        found.update(part)
        tokens += taken
    return found, tokens


async def test_each_document_gets_its_score_in_parts(llama: FakeLlama, reranker: ServedReranker) -> None:
    documents = {place: "x" * (place % 5) for place in range(10, 110)} | {3: "y" * 65_536}
    found, tokens = await scores(reranker, "qq", documents)
    # llama.cpp tells logits.
    for place, text in documents.items():
        assert found[place] == pytest.approx(1 / (1 + math.exp(2 - min(len(text), 700))))
    assert tokens == sum(2 + len(text) for text in documents.values())
    assert [len(body["documents"]) for body in llama.requests] == [64, 36, 1]
    assert [body["top_n"] for body in llama.requests] == [64, 36, 1]
    assert reranker.status()[:3] == (None, 0, 3)


@pytest.mark.parametrize(
    "answer",
    [
        "nonsense",
        {"results": [], "usage": {}},
        {"results": [{"index": 0, "relevance_score": None}], "usage": {}},
        {"results": [{"index": 0, "relevance_score": 1}, {"index": 1, "relevance_score": 2}], "usage": {}},
        [{"index": 0}],
    ],
)
async def test_a_broken_answer_is_a_fault_of_its_request_alone(
    llama: FakeLlama, reranker: ServedReranker, answer: Any
) -> None:
    async def broken(response: web.StreamResponse) -> None:
        await response.write(json.dumps(answer).encode())

    llama.behaviours.append(broken)
    with pytest.raises(EngineFault, match="/v1/rerank"):
        await scores(reranker, "q", {0: "d"})
    assert reranker.status()[:2] == (None, 0)
    assert (await scores(reranker, "q", {0: "d"}))[0] == {0: 0.5}


async def test_a_score_that_json_does_not_have_is_a_fault(llama: FakeLlama, tiny_ranker: Path) -> None:
    async def broken(response: web.StreamResponse) -> None:
        await response.write(b'{"results": [{"index": 0, "relevance_score": "nan"}], "usage": {}}')

    text = TextModel(reranker_at(llama.url, tiny_ranker))
    await text.start(lambda line: None)
    llama.behaviours.append(broken)
    with pytest.raises(EngineFault, match="not finite"):
        await scores_of(text, "d")
    await text.close()


async def test_what_the_server_refuses_is_the_request_s_own_fault(llama: FakeLlama, reranker: ServedReranker) -> None:
    llama.statuses["/v1/rerank"] = 400
    with pytest.raises(InvalidRequest, match="The engine refuses the request: no") as caught:
        await scores(reranker, "q", {0: "d"})
    assert (caught.value.param, caught.value.code) == ("documents", None)


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (400, "input (604 tokens) is larger than the max context size (512 tokens). skipping"),
        (500, "input (9000 tokens) is too large to process. increase the physical batch size"),
        (400, "This model's maximum context length is 512 tokens. However, you requested 604 tokens"),
    ],
)
def test_a_document_that_is_too_long_has_its_code(status: int, said: str) -> None:
    error = refused(ServerFailed("-", status, json.dumps({"error": {"message": said}})), "documents")
    assert error is not None
    assert error.code == "context_length_exceeded"


async def test_another_worker_takes_over_after_a_killed_server(tiny_ranker: Path) -> None:
    documents = tuple("x" * (place % 7) for place in range(100))
    async with twins() as system, contextlib.AsyncExitStack() as stack:
        fakes = []
        hangs = asyncio.Event()

        async def hang(response: web.StreamResponse) -> None:
            hangs.set()
            await asyncio.Event().wait()

        for name in ("w1", "w2"):
            fake = await stack.enter_async_context(FakeLlama(bare_tokenizer(tiny_ranker)).running())
            text = TextModel(reranker_at(fake.url, tiny_ranker))
            await text.start(lambda line: None)
            stack.push_async_callback(text.close)
            fake.requests.clear()
            fake.behaviours.append(hang)
            system.worker(name, slots=1, engine=text)
            fakes.append(fake)
        prompts = ("qqq", *documents)
        wanted = request(completion_type=CompletionType.RERANK, prompts=prompts, stream=False, messages=())
        assert not text.can_resume(wanted)  # so a deferred one does not give way
        async with system.dispatcher.submit(wanted) as answer:
            await hangs.wait()
            (killed,) = [fake for fake in fakes if fake.requests]
            for fake in fakes:
                fake.behaviours.clear()
            await killed.kill()
            deltas = [delta async for some in answer.deltas() for delta in some]
        found = {one.index: struct.unpack("<f", b64decode(one.embedding))[0] for one in deltas if one.embedding}
        assert found == {
            place: pytest.approx(1 / (1 + math.exp(3 - len(text)))) for place, text in enumerate(documents)
        }
        assert answer.completed is not None
        assert answer.completed.usage.prompt_tokens == sum(3 + len(text) for text in documents)
        assert (await system.state(wanted.id)).attempt == 2


async def test_what_does_not_rank_is_refused(llama: FakeLlama, tiny_ranker: Path) -> None:
    llama.statuses["/v1/rerank"] = 501
    reranker = reranker_at(llama.url, tiny_ranker, engine_start_timeout=1)
    with pytest.raises(ConfigurationError, match=r"cannot serve .* status 501"):
        await reranker.start(lambda line: None)
    await reranker.close()


async def test_sglang_tells_a_bare_list() -> None:
    told: Any = [{"index": 1, "score": 0.25, "document": "b"}, {"index": 0, "score": 0.5, "document": "a"}]
    async with inference_server({"/v1/rerank": json.dumps(told).encode()}) as server:
        http = Http(server.url)
        assert await served_reranker._scores(http, "q", ["a", "b"]) == ([0.5, 0.25], 0)
        await http.close()


@pytest.mark.parametrize(("architecture", "relevance"), [("bert", served_reranker._sigmoid), ("qwen3", float)])
async def test_which_scores_of_llama_cpp_are_logits(
    tiny_ranker: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, relevance: Any
) -> None:
    monkeypatch.setattr(gguf_head, "head_of", lambda file: Head(architecture, classifies=True, ranks=True))
    reranker = reranker_at("http://h", tiny_ranker)
    await reranker._read(tiny_ranker)
    assert reranker._relevance is relevance
    assert 0 <= served_reranker._sigmoid(-1e4) <= served_reranker._sigmoid(1e4) <= 1


async def test_a_file_for_another_task_ends_the_start(tiny_gguf: Path, tiny_ranker: Path) -> None:
    """llama.cpp would serve it, with numbers that mean nothing."""
    embedder = ServedEmbedder(
        InferenceSettings(_env_file=None, default_model=str(tiny_ranker), engine_url="http://h"),
        LlamaCppPooling("embed"),
    )
    for engine, said in ((embedder, "set MODEL_TASK=rerank"), (reranker_at("http://h", tiny_gguf), "no cross-encoder")):
        with pytest.raises(ConfigurationError, match=said):
            await engine.start(lambda line: None)
        await engine.close()


@pytest.mark.parametrize("engine", POOLING)
def test_a_task_decides_what_is_served(engine: Any) -> None:
    given: dict[str, Any] = {"inference_engine": engine, "engine_url": "http://h", "model_task": "rerank"}
    assert build_model(InferenceSettings(_env_file=None, **given)).completion_types == (CompletionType.RERANK,)


def test_a_type_that_only_newer_workers_know_hides_none_of_them() -> None:
    told = {"id": "w", "version": "1", "started_at": 0, "heartbeat_at": 0, "model": "m", "status": "ready"}
    told |= {"slots": 1, "engine": "e", "completion_types": ["rerank", "painting"]}
    assert WorkerInfo.model_validate_json(json.dumps(told)).completion_types == (CompletionType.RERANK,)
