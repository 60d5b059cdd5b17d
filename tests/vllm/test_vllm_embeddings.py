"""Vectors and scores of the real vLLM beside those of sentence-transformers. `make test-vllm` runs this."""

from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
from sentence_transformers import CrossEncoder, SentenceTransformer

from forebay_contracts.wire.errors import InvalidRequest
from forebay_inference.engine.text.model import TextModel
from support.embeddings import QUERY, TEXTS, embedding, scores, vectors
from support.minilm import FOLDER, write_cross_encoder
from support.served import kill_server
from support.vllm import vllm_embedder, vllm_reranker

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600), pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def model() -> AsyncIterator[TextModel]:
    text = TextModel(vllm_embedder(FOLDER, max_concurrent_requests=8))
    loaded = await text.start(lambda line: None)
    assert (loaded.context_length, loaded.dimensions) == (256, 384)
    yield text
    await text.close()


async def test_the_same_as_sentence_transformers(model: TextModel) -> None:
    reference = SentenceTransformer(str(FOLDER), device="cpu", local_files_only=True)
    steps = model.status().steps
    tokens, found = await vectors(model, *TEXTS)
    assert tokens == sum(len(reference.tokenizer(text).input_ids) for text in TEXTS)
    assert max(np.abs(found[place] - vector).max() for place, vector in enumerate(reference.encode(TEXTS))) < 1e-5
    assert model.status().steps > steps


async def test_what_cannot_be_served(model: TextModel) -> None:
    with pytest.raises(InvalidRequest, match="input 0 resulted in 257 tokens"):
        await vectors(model, "word " * 255)
    with pytest.raises(InvalidRequest, match="384 dimensions"):
        [_ async for _ in model.generate(embedding("text", dimensions=100), {})]


async def test_a_server_that_dies_is_a_fault(model: TextModel) -> None:
    """The last one: it breaks the server of all."""
    kill_server(model.engine)  # type: ignore[arg-type]
    with pytest.raises(Exception, match="vLLM ended with signal SIGKILL"):
        await vectors(model, "text")


async def test_scores_are_those_of_sentence_transformers(tmp_path: Path) -> None:
    folder = write_cross_encoder(tmp_path / "cross-encoder")
    reference = CrossEncoder(str(folder), device="cpu", local_files_only=True)
    model = TextModel(vllm_reranker(folder, max_concurrent_requests=8))
    await model.start(lambda line: None)
    pairs = [(QUERY, text) for text in TEXTS]
    tokens, found = await scores(model, *TEXTS)
    assert np.abs(found - reference.predict(pairs)).max() < 1e-5
    assert tokens == sum(len(reference.tokenizer(*pair).input_ids) for pair in pairs)
    with pytest.raises(InvalidRequest, match="maximum context length"):
        await scores(model, "word " * 600)
    await model.close()
