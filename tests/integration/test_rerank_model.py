"""Scores of cross-encoders: of sentence-transformers in the worker's process, and of llama.cpp's server beside it."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import CrossEncoder

from forebay_contracts.settings import InferenceSettings
from forebay_contracts.wire.errors import ConfigurationError, InvalidRequest
from forebay_inference.engine.embedding.reranker import CrossEncoderEngine
from forebay_inference.engine.text.model import TextModel
from support.embeddings import QUERY, TEXTS, scores
from support.minilm import FOLDER, write_cross_encoder, write_gguf
from support.served import llama_cpp_reranker

pytestmark = [pytest.mark.model, pytest.mark.asyncio(loop_scope="module")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cross_encoder(tmp_path_factory.mktemp("model") / "cross-encoder")


@pytest.fixture(scope="module")
def reference(folder: Path) -> CrossEncoder:
    """The library by itself."""
    return CrossEncoder(str(folder), device="cpu", local_files_only=True)


def engine(folder: Path) -> TextModel:
    given: dict[str, Any] = {"default_model": str(folder), "model_device": "cpu", "llm_batch_size": 200}
    return TextModel(CrossEncoderEngine(InferenceSettings(_env_file=None, **given)))


async def test_the_same_as_the_library_by_itself(folder: Path, reference: CrossEncoder) -> None:
    model = engine(folder)
    await model.start(lambda line: None)
    pairs = [(QUERY, text) for text in TEXTS]
    (tokens, found), (_, again) = await asyncio.gather(scores(model, *TEXTS), scores(model, *TEXTS[::-1]))
    assert np.abs(found - reference.predict(pairs)).max() < 1e-5
    assert np.abs(again[::-1] - found).max() < 1e-5
    assert tokens == sum(len(reference.tokenizer(*pair).input_ids) for pair in pairs)
    with pytest.raises(InvalidRequest, match="the query and document 1 resulted in 6") as caught:
        await scores(model, "fine", "word " * 600)
    assert (caught.value.param, caught.value.code) == ("documents", "context_length_exceeded")
    await model.close()


async def test_what_is_no_cross_encoder_is_refused() -> None:
    model = engine(FOLDER)
    with pytest.raises(ConfigurationError, match="is no cross-encoder"):
        await model.start(lambda line: None)
    await model.close()


async def test_llama_cpp_s_scores_are_the_same(folder: Path, reference: CrossEncoder, tmp_path: Path) -> None:
    model = TextModel(llama_cpp_reranker(write_gguf(tmp_path / "cross-encoder.gguf", folder)))
    await model.start(lambda line: None)
    tokens, found = await scores(model, *TEXTS)
    pairs = [(QUERY, text) for text in TEXTS]
    assert np.abs(found - reference.predict(pairs)).max() < 1e-3
    assert tokens == sum(len(reference.tokenizer(*pair).input_ids) for pair in pairs)
    with pytest.raises(InvalidRequest, match="larger than the max context size") as caught:
        await scores(model, "word " * 600)
    assert caught.value.param == "documents"
    await model.close()
