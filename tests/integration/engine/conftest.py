"""One real engine on the default model for all tests that need one: loading it takes seconds."""

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from forebay_contracts.settings import InferenceSettings
from forebay_inference.engine.text.model import TextModel
from forebay_inference.engine.transformers.engine import TransformersEngine

# Read before the settings of the machine are hidden from the tests: the model is fetched once, for all runs.
DATA_DIR = Path(os.environ.get("DATA_DIR") or Path.home() / ".cache" / "forebay")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Where the default model is, or is fetched to."""
    return DATA_DIR


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def engine() -> AsyncIterator[TextModel]:
    settings = InferenceSettings(
        _env_file=None, data_dir=DATA_DIR, model_quantization="nf4", max_concurrent_requests=4, llm_batch_size=64
    )
    engine = TextModel(TransformersEngine(settings))
    lines: list[str] = []
    info = await engine.start(lines.append)
    assert (info.quantization, info.device, info.context_length) == ("nf4", "cpu", 8192)
    assert any(line.startswith("loading the weights") for line in lines)
    yield engine
    await engine.close()
