"""What several unit tests share: a tiny model in a GGUF file, and a server that seems to serve it."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from forebay_inference.engine.served.tokenizer import bare_tokenizer
from support.fake_llama import FakeLlama
from support.gguf import write_tiny_gguf


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the model is."""
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="session")
def tiny_ranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a classifier."""
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "ranker.gguf", ranks=True)


@pytest_asyncio.fixture
async def llama(tiny_gguf: Path) -> AsyncIterator[FakeLlama]:
    """The server."""
    async with FakeLlama(bare_tokenizer(tiny_gguf)).running() as fake:
        yield fake
