"""Vectors of llama.cpp's server, of a real model, beside those of sentence-transformers of the same weights."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
from sentence_transformers import SentenceTransformer

from forebay_contracts.wire.errors import ConfigurationError, InvalidRequest
from forebay_inference.engine.protocol import EngineFault
from forebay_inference.engine.served.embedder import ServedEmbedder
from forebay_inference.engine.text.model import TextModel
from support.embeddings import TEXTS, embedding, vectors
from support.gguf import write_tiny_gguf
from support.minilm import FOLDER, write_gguf
from support.served import kill_server, llama_cpp_embedder

pytestmark = [pytest.mark.model, pytest.mark.asyncio(loop_scope="module")]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "minilm.gguf")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def embedder(file: Path) -> AsyncIterator[ServedEmbedder]:
    yield (started := llama_cpp_embedder(file))
    await started.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def model(embedder: ServedEmbedder) -> TextModel:
    text = TextModel(embedder)
    loaded = await text.start(lambda line: None)
    assert (loaded.context_length, loaded.dimensions, loaded.device) == (512, 384, "llama.cpp")
    return text


async def test_the_same_as_sentence_transformers(model: TextModel) -> None:
    reference = SentenceTransformer(str(FOLDER), device="cpu", local_files_only=True)
    tokens, found = await vectors(model, *TEXTS)
    expected = reference.encode(TEXTS)
    assert tokens == sum(len(reference.tokenizer(text).input_ids) for text in TEXTS)
    # llama.cpp keeps keys and values in 16 bits.
    assert max(np.abs(found[index] - expected[index]).max() for index in found) < 1e-3
    ids = tuple(reference.tokenizer(TEXTS[0], add_special_tokens=False).input_ids)
    assert np.array_equal((await vectors(model, ids))[1][0], (await vectors(model, TEXTS[0]))[1][0])


async def test_many_at_once_are_each_its_own(model: TextModel) -> None:
    alone = {text: (await vectors(model, text))[1][0] for text in TEXTS[:3]}
    mixed = [TEXTS[number % 3] for number in range(9)]
    together = await asyncio.gather(*(vectors(model, text) for text in mixed))
    for text, (_, found) in zip(mixed, together, strict=True):
        assert np.abs(found[0] - alone[text]).max() < 1e-3
    assert model.status()[:2] == (None, 0)


async def test_what_cannot_be_served(model: TextModel) -> None:
    with pytest.raises(InvalidRequest, match="input 0 resulted in 602 tokens"):
        await vectors(model, "word " * 600)
    with pytest.raises(InvalidRequest, match="384 dimensions"):
        [_ async for _ in model.generate(embedding("text", dimensions=100), {})]


async def test_a_model_that_does_not_pool_ends_the_start(tmp_path: Path) -> None:
    embedder = llama_cpp_embedder(write_tiny_gguf(tmp_path / "tiny.gguf"))
    with pytest.raises(ConfigurationError, match=r"cannot serve .*: /v1/embeddings was answered with status 400"):
        await embedder.start(lambda line: None)
    await embedder.close()


async def test_a_server_that_dies_is_a_fault(model: TextModel, embedder: ServedEmbedder) -> None:
    """The last one: it breaks the server of all."""
    kill_server(embedder)
    with pytest.raises(EngineFault, match=r"llama\.cpp ended with signal SIGKILL"):
        await vectors(model, "text")
    assert "SIGKILL" in str(model.status().fault)
