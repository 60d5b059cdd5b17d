"""`POST /v1/embeddings` and `POST /v1/rerank` through the queue, with the simulated engine."""

import asyncio
import base64
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import openai
import pytest
import pytest_asyncio

from forebay_contracts.wire.state import RequestStatus
from support.answers import error_of, summary
from support.nats import NatsServer
from support.proxy import Proxy
from support.stack import MODEL, Stack, running
from support.view import idle

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(module_nats: NatsServer) -> AsyncIterator[Stack]:
    async with running(module_nats, max_concurrent_requests=4, max_request_bytes=900_000) as found:
        yield found


async def post(stack: Stack, **body: Any) -> Any:
    return await stack.http.post(f"{stack.apis[0].url}/v1/embeddings", json={"model": MODEL, **body})


async def test_a_vector_for_each_input(stack: Stack) -> None:
    client = stack.openai()
    both = await client.embeddings.create(model=MODEL, input=["one two", "three"])
    assert (both.object, both.model) == ("list", f"HuggingFaceTB/{MODEL}")
    assert [(item.object, item.index, len(item.embedding)) for item in both.data] == [
        ("embedding", 0, 64),
        ("embedding", 1, 64),
    ]
    assert (both.usage.prompt_tokens, both.usage.total_tokens) == (3, 3)
    for item, text in zip(both.data, ["one two", "three"], strict=True):
        alone = await client.embeddings.create(model=MODEL, input=text)
        assert alone.data[0].embedding == item.embedding
        assert np.linalg.norm(item.embedding) == pytest.approx(1, abs=1e-6)


async def test_floats_and_base64_are_the_same_vector(stack: Stack) -> None:
    floats = (await post(stack, input="text", encoding_format="float")).json()["data"][0]["embedding"]
    encoded = (await post(stack, input="text", encoding_format="base64")).json()["data"][0]["embedding"]
    assert np.frombuffer(base64.b64decode(encoded), dtype="<f4").tolist() == floats
    assert (await post(stack, input="text")).json()["data"][0]["embedding"] == floats


async def test_tokens_are_inputs_too(stack: Stack) -> None:
    one, many = (await post(stack, input=[1, 2, 3])).json(), (await post(stack, input=[[1, 2, 3], [4]])).json()
    assert len(one["data"]) == 1
    assert [item["index"] for item in many["data"]] == [0, 1]
    assert many["data"][0]["embedding"] == one["data"][0]["embedding"]
    assert many["usage"] == {"prompt_tokens": 4, "total_tokens": 4}


async def test_more_vectors_than_one_message_could_carry(stack: Stack) -> None:
    texts = [f"text {number}" for number in range(2048)]
    answer = await stack.openai().embeddings.create(model=MODEL, input=texts, dimensions=1536)
    assert [item.index for item in answer.data] == list(range(2048))
    assert {len(item.embedding) for item in answer.data} == {1536}
    assert answer.data[77].embedding == (
        (await stack.openai().embeddings.create(model=MODEL, input="text 77", dimensions=1536)).data[0].embedding
    )


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({}, "input", "missing_required_parameter"),
        ({"input": ""}, "input", "empty_string"),
        ({"input": []}, "input", "empty_array"),
        ({"input": ["a", ""]}, "input[1]", "empty_string"),
        ({"input": [[]]}, "input[0]", "empty_array"),
        ({"input": [1, "a"]}, "input[1]", "invalid_type"),
        ({"input": [-1]}, "input[0]", "integer_below_min_value"),
        ({"input": 1}, "input", "invalid_type"),
        ({"input": ["a"] * 2049}, "input", "array_above_max_length"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "invalid_value"),
        ({"input": "a", "dimensions": 0}, "dimensions", "integer_below_min_value"),
        ({"input": "a", "dimensions": "9"}, "dimensions", "invalid_type"),
        ({"input": "a", "stream": True}, "stream", "unknown_parameter"),
    ],
)
async def test_bodies_that_cannot_be_served(stack: Stack, body: dict[str, Any], param: str, code: str) -> None:
    refused = await post(stack, **body)
    error = error_of(refused)
    assert (refused.status_code, error["type"], error["param"], error["code"]) == (
        400,
        "invalid_request_error",
        param,
        code,
    )


async def test_accepted_and_of_no_meaning_here(stack: Stack) -> None:
    assert (await post(stack, input="a", user="someone", dimensions=None, encoding_format=None)).status_code == 200


async def test_state_and_counters(stack: Stack) -> None:
    before = await idle(stack)
    answer = await post(stack, input="a b c")
    state = await stack.reaches(answer.headers["x-request-id"], RequestStatus.COMPLETED)
    assert state.completion_type == "embedding"
    assert state.usage is not None
    assert (state.usage.prompt_tokens, state.usage.completion_tokens) == (3, 0)
    assert (await idle(stack))["total_processed"] == before["total_processed"] + 1


async def test_a_failure_is_definite(stack: Stack) -> None:
    assert summary(await post(stack, input=["fine", "[[fail]]"])) == (500, "server_error", "inference_failed", "false")


async def test_another_worker_computes_what_is_missing(nats_server: NatsServer) -> None:
    async with running(nats_server, workers=1) as stack:
        whole = asyncio.create_task(post(stack, input=["a", "b", "[[delay_ms=3000]]", "c"]))
        request_id = (await stack.begins()).id
        await stack.workers[0].kill()
        await stack.worker()
        answer = await whole
        assert answer.status_code == 200
        assert [item["index"] for item in answer.json()["data"]] == [0, 1, 2, 3]
        state = await stack.reaches(request_id, RequestStatus.COMPLETED)
        assert (state.attempt, state.worker) == (2, stack.workers[1].id)
        for item, text in zip(answer.json()["data"], ["a", "b", "[[delay_ms=3000]]", "c"], strict=True):
            if not text.startswith("[["):
                assert (await post(stack, input=text)).json()["data"][0]["embedding"] == item["embedding"]


async def test_vectors_that_were_lost_on_the_way_are_sent_again(nats_server: NatsServer) -> None:
    texts = [f"[[delay_ms=100]] text {number}" for number in range(20)]
    async with running(nats_server, workers=0, ack_wait=30) as stack:
        proxy = await Proxy(nats_server.url).start()
        await stack.worker(nats_url=proxy.url)
        replies = await stack.connection.client.subscribe("inference.replies.>")
        whole = asyncio.create_task(post(stack, input=texts))
        for _ in range(5):
            await replies.next_msg(timeout=30)
        await proxy.lose(b'"delta"', 3)
        await proxy.start()
        answer = await whole
        assert answer.status_code == 200, answer.text
        assert [item["index"] for item in answer.json()["data"]] == list(range(20))
        assert (await stack.reaches(answer.headers["x-request-id"], RequestStatus.COMPLETED)).attempt == 1
        for number in (0, 7, 19):
            alone = (await post(stack, input=texts[number])).json()["data"][0]["embedding"]
            assert alone == answer.json()["data"][number]["embedding"]
        await proxy.cut()


async def test_a_client_that_leaves_stops_it(stack: Stack) -> None:
    client = stack.openai(timeout=1)
    with pytest.raises(openai.APITimeoutError):
        await client.embeddings.create(model=MODEL, input=["[[delay_ms=60000]]"])
    await idle(stack)


async def test_asked_again_with_the_same_key(stack: Stack) -> None:
    before = (await idle(stack))["total_queued"]
    url, headers = f"{stack.apis[0].url}/v1/embeddings", {"idempotency-key": "vectors-1"}
    body = {"model": MODEL, "input": ["a", "b"]}
    first, again, as_base64 = [
        (await stack.http.post(url, json=body | {"encoding_format": form}, headers=headers)).json()
        for form in ("float", "float", "base64")
    ]
    assert first == again
    decoded = np.frombuffer(base64.b64decode(as_base64["data"][1]["embedding"]), dtype="<f4").tolist()
    assert decoded == first["data"][1]["embedding"]
    assert (await idle(stack))["total_queued"] == before + 1


async def rerank(stack: Stack, headers: dict[str, str] | None = None, **body: Any) -> Any:
    url = f"{stack.apis[0].url}/v1/rerank"
    return await stack.http.post(url, json={"model": MODEL, **body}, headers=headers)


DOCUMENTS = ["a cat", "a fat cat", "rain", {"text": "fat cat sat", "title": "t"}]


async def test_documents_come_back_by_their_relevance(stack: Stack) -> None:
    answer = await rerank(stack, query="fat cat sat", documents=DOCUMENTS)
    whole = answer.json()
    assert [one["index"] for one in whole["results"]] == [3, 1, 0, 2]
    assert [one["relevance_score"] for one in whole["results"]] == pytest.approx([1, 2 / 3, 1 / 3, 0])
    assert whole["results"][0]["document"] == {"text": "fat cat sat"}
    assert (whole["object"], whole["model"]) == ("list", f"HuggingFaceTB/{MODEL}")
    assert whole["usage"] == {"prompt_tokens": 21, "total_tokens": 21}
    assert whole["id"] == answer.headers["x-request-id"]
    state = await stack.reaches(whole["id"], RequestStatus.COMPLETED)
    assert state.completion_type == "rerank"
    assert state.usage is not None
    assert (state.usage.prompt_tokens, state.usage.completion_tokens) == (21, 0)


async def test_the_best_alone_without_their_texts(stack: Stack) -> None:
    given = {"query": "fat cat", "documents": DOCUMENTS, "top_n": 2, "return_documents": False}
    key = {"idempotency-key": "best-1"}
    first, again = [(await rerank(stack, key, **given)).json() for _ in range(2)]
    # Of equal ones, the first comes first.
    assert first["results"] == [{"index": 1, "relevance_score": 1.0}, {"index": 3, "relevance_score": 1.0}]
    assert first == again
    body = {"model": MODEL, "query": "fat cat", "documents": DOCUMENTS, "top_n": 2}
    second_form = await stack.http.post(f"{stack.apis[0].url}/v2/rerank", json=body)
    assert second_form.json()["results"] == first["results"]
    many = await rerank(stack, query="x 7", documents=[f"x {number}" for number in range(2048)], top_n=1)
    assert many.json()["results"] == [{"index": 7, "relevance_score": 1.0, "document": {"text": "x 7"}}]


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"documents": ["a"]}, "query", "missing_required_parameter"),
        ({"query": "", "documents": ["a"]}, "query", "empty_string"),
        ({"query": "a", "documents": []}, "documents", "empty_array"),
        ({"query": "a", "documents": ["a"] * 2049}, "documents", "array_above_max_length"),
        ({"query": "a", "documents": ["a"], "top_n": 0}, "top_n", "integer_below_min_value"),
        ({"query": "a", "documents": ["a"], "rank_fields": ["text"]}, "rank_fields", "unknown_parameter"),
    ],
)
async def test_what_cannot_be_reranked(stack: Stack, body: dict[str, Any], param: str, code: str) -> None:
    error = error_of(refused := await rerank(stack, **body))
    assert (refused.status_code, error["param"], error["code"]) == (400, param, code)


async def test_a_failed_rerank_is_definite(stack: Stack) -> None:
    failed = await rerank(stack, query="a", documents=["fine", "[[fail]]"])
    assert summary(failed) == (500, "server_error", "inference_failed", "false")
