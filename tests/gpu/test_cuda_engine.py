"""The CUDA path: `pytest -m gpu` on a machine with a GPU, the default model being in DATA_DIR or to be had."""

import asyncio
import os
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from forebay_contracts.settings import InferenceSettings  # noqa: E402
from forebay_inference.engine.text.model import TextModel  # noqa: E402
from forebay_inference.engine.transformers.engine import TransformersEngine  # noqa: E402
from support.engine import answer, chat  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.model,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DATA_DIR = Path(os.environ.get("DATA_DIR") or Path.home() / ".cache" / "forebay")


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8", "none"])
async def test_the_engine_answers_on_cuda(quantization: str) -> None:
    settings = InferenceSettings(
        _env_file=None,
        data_dir=DATA_DIR,
        model_quantization=quantization,
        model_device="cuda:0",
        max_concurrent_requests=4,
    )
    engine = TextModel(TransformersEngine(settings))
    info = await engine.start(lambda line: None)
    try:
        assert (info.device, info.quantization) == ("cuda:0", quantization)
        answers = await asyncio.gather(
            answer(engine, chat(max_tokens=64)),
            answer(engine, chat("Tell me about the sea.", temperature=1.0, top_p=0.9, seed=1)),
            answer(engine, chat("A colour?", response_format={"type": "json_object"}, max_tokens=64)),
        )
        assert "Paris" in answers[0].text
        assert answers[1].text
        assert answers[2].text.startswith("{")
    finally:
        await engine.close()


async def test_auto_finds_the_gpu_and_quantizes_nothing_that_fits() -> None:
    engine = TextModel(TransformersEngine(InferenceSettings(_env_file=None, data_dir=DATA_DIR)))
    info = await engine.start(lambda line: None)
    await engine.close()
    assert (info.device, info.quantization) == ("cuda:0", "none")
