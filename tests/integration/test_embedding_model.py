"""A real embedding model, from the engine to the SDK: the numbers, the limits, and many at once."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import pytest_asyncio
from sentence_transformers import SentenceTransformer

from forebay_contracts.settings import InferenceSettings
from forebay_contracts.wire.errors import ConfigurationError, InvalidRequest, UnsupportedByModel
from forebay_inference.engine.embedding.engine import EmbeddingEngine
from forebay_inference.engine.events import Finished, Vector
from forebay_inference.engine.text.model import TextModel
from support.answers import summary
from support.embeddings import NAME, TEXTS, embedding, vectors
from support.engine import chat
from support.minilm import FOLDER
from support.nats import NatsServer
from support.stack import Stack, running

pytestmark = [pytest.mark.model, pytest.mark.asyncio(loop_scope="module")]


def settings(**given: Any) -> InferenceSettings:
    return InferenceSettings(
        _env_file=None, **{"default_model": str(FOLDER), "model_device": "cpu", "llm_batch_size": 1024, **given}
    )


@pytest.fixture(scope="module")
def reference() -> SentenceTransformer:
    """The library by itself."""
    return SentenceTransformer(str(FOLDER), device="cpu", local_files_only=True)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[TextModel]:
    engine = TextModel(EmbeddingEngine(settings()))
    info = await engine.start(lambda line: None)
    assert (info.context_length, info.quantization, info.device) == (256, "none", "cpu")
    yield engine
    await engine.close()


async def test_the_same_as_the_library_by_itself(engine: TextModel, reference: SentenceTransformer) -> None:
    tokens, found = await vectors(engine, *TEXTS)
    expected = reference.encode(TEXTS)
    assert max(np.abs(found[index] - expected[index]).max() for index in found) < 1e-5
    assert tokens == sum(len(reference.tokenizer(text).input_ids) for text in TEXTS)


async def test_token_ids_are_the_text_they_stand_for(engine: TextModel, reference: SentenceTransformer) -> None:
    ids = tuple(reference.tokenizer(TEXTS[0], add_special_tokens=False).input_ids)
    of_ids, of_text = await vectors(engine, ids), await vectors(engine, TEXTS[0])
    assert of_ids[0] == of_text[0]
    assert np.array_equal(of_ids[1][0], of_text[1][0])


async def test_sixty_four_requests_share_forward_passes(engine: TextModel) -> None:
    alone = {text: (await vectors(engine, text))[1][0] for text in TEXTS}
    mixed = [TEXTS[number % len(TEXTS)] for number in range(64)]
    passes = engine.status().steps
    together = await asyncio.gather(*(vectors(engine, text) for text in mixed))
    assert engine.status().steps - passes < len(mixed) / 2
    for text, (_, found) in zip(mixed, together, strict=True):
        assert np.abs(found[0] - alone[text]).max() < 1e-5


async def test_one_input_does_not_wait_for_all_of_another_request(engine: TextModel) -> None:
    large = asyncio.create_task(vectors(engine, *["word " * 200] * 400))
    await asyncio.sleep(0)
    await vectors(engine, "small")
    assert not large.done()
    large.cancel()
    await asyncio.gather(large, return_exceptions=True)
    # What was cancelled is not computed any further: nothing is before this one.
    passes = engine.status().steps
    await vectors(engine, "small")
    assert engine.status().steps - passes <= 2


async def test_too_long(engine: TextModel) -> None:
    await vectors(engine, "word " * 254)
    for too_long in ("word " * 255, (7,) * 255):
        with pytest.raises(InvalidRequest, match="input 1 resulted in 257 tokens") as caught:
            await vectors(engine, "fine", too_long)
        assert (caught.value.param, caught.value.code) == ("input", "context_length_exceeded")


async def test_what_cannot_be_served(engine: TextModel) -> None:
    with pytest.raises(InvalidRequest, match="Token 40000 is not in the vocabulary") as caught:
        await vectors(engine, (1, 40_000))
    assert caught.value.param == "input[0]"
    with pytest.raises(InvalidRequest, match="384 dimensions") as caught:
        [_ async for _ in engine.generate(embedding("text", dimensions=100), {})]
    assert caught.value.param == "dimensions"
    assert len([event async for event in engine.generate(embedding("text", dimensions=384), {})]) == 3
    with pytest.raises(UnsupportedByModel):
        engine.generate(chat(), {})


async def test_what_a_client_has_already_is_not_computed_again(engine: TextModel) -> None:
    passes = engine.status().steps
    events = [event async for event in engine.generate(embedding("a", "b", "c"), {0: [0], 2: [0]})]
    assert [event.index for event in events if isinstance(event, Vector)] == [1]
    assert sorted(event.index for event in events if isinstance(event, Finished)) == [0, 1, 2]
    assert engine.status().steps == passes + 1


async def test_what_is_no_embedding_model_is_refused(tmp_path: Any) -> None:
    (tmp_path / "config.json").write_text("{}")
    for given, sentence in [
        ({"default_model": str(tmp_path)}, "is no sentence-transformers model"),
        ({"model_quantization": "nf4"}, "MODEL_QUANTIZATION=nf4: an embedding model keeps its precision"),
    ]:
        engine = TextModel(EmbeddingEngine(settings(**given)))
        with pytest.raises(ConfigurationError, match=sentence):
            await engine.start(lambda line: None)
        await engine.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def started(module_nats: NatsServer) -> AsyncIterator[tuple[Stack, httpx.Response]]:
    """The stack, and the answer to a chat that waited while no worker lived to say what the model serves."""
    given = {"model_name": NAME, "default_model": FOLDER, "max_concurrent_requests": 64, "llm_batch_size": 2048}
    async with running(module_nats, workers=0, **given) as stack:
        waiting = asyncio.create_task(stack.chat("hi", model=NAME))
        await stack.apis[0].logged("queued for")
        await stack.worker(inference_engine="embedding")
        yield stack, await waiting


@pytest.fixture(scope="module")
def stack(started: tuple[Stack, httpx.Response]) -> Stack:
    return started[0]


@pytest.fixture(scope="module")
def early_chat(started: tuple[Stack, httpx.Response]) -> httpx.Response:
    return started[1]


async def test_through_the_sdk(stack: Stack, reference: SentenceTransformer) -> None:
    client = stack.openai()
    texts = TEXTS[:4]
    default = await client.embeddings.create(model=NAME, input=texts)
    floats = await client.embeddings.create(model=NAME, input=texts, encoding_format="float")
    assert [item.embedding for item in default.data] == [item.embedding for item in floats.data]
    found = np.array([item.embedding for item in floats.data])
    assert np.abs(found - reference.encode(texts)).max() < 1e-5
    similar = found @ found.T
    assert similar[0, 1] > 0.6 > 0.3 > similar[0, 2]
    assert default.usage.prompt_tokens == sum(len(reference.tokenizer(text).input_ids) for text in texts)


async def test_sixty_four_clients_at_once(stack: Stack, reference: SentenceTransformer) -> None:
    client = stack.openai()
    texts = [f"This is sentence number {number}." for number in range(64)]
    answers = await asyncio.gather(*(client.embeddings.create(model=NAME, input=text) for text in texts))
    found = np.array([answer.data[0].embedding for answer in answers])
    assert np.abs(found - reference.encode(texts)).max() < 1e-5


async def test_errors_as_the_client_sees_them(stack: Stack) -> None:
    client = stack.openai()
    with pytest.raises(openai.BadRequestError) as caught:
        await client.embeddings.create(model=NAME, input="word " * 300)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "input")
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "hi"}])
    assert (caught.value.code, caught.value.param) == ("model_not_supported", "model")


async def test_the_worker_refuses_what_the_api_could_not(early_chat: httpx.Response) -> None:
    assert summary(early_chat)[:3] == (400, "invalid_request_error", "model_not_supported")
