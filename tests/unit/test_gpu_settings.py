"""What a worker decides about a GPU before it has one: flash attention, CUDA graphs, and the quantization `auto`."""

import importlib.metadata
import json
import logging
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from forebay_contracts.settings import InferenceSettings
from forebay_inference.engine.protocol import EngineFault
from forebay_inference.engine.transformers import engine, gpu
from forebay_inference.engine.transformers.cache_shape import CacheShape
from forebay_inference.engine.transformers.loading import quantization_that_fits
from gpu.run import peers
from support.configs import LLAMA_8B

PLAIN = CacheShape(2, 2, 64)
GIB = 1 << 30


def model(*, parameters: tuple[str, ...] = ("model.layers.0.mlp.up_proj.weight",), **given: Any) -> Any:
    config = SimpleNamespace(model_type="m", quantization_config=given.pop("quantization", None))
    fields = {"_supports_flash_attn": True, "_compatible_flash_implementations": None, **given}
    named = [(name, None) for name in parameters]
    device = torch.device("cuda", 0)
    return SimpleNamespace(config=config, device=device, named_parameters=lambda: named, **fields)


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """An Ampere card with flash-attn 2."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(gpu, "is_flash_attn_3_available", lambda **_: False)
    monkeypatch.setattr(gpu, "is_flash_attn_2_available", lambda **_: True)


def settings(model: Any, shape: CacheShape = PLAIN, *, by_sequence: bool = False) -> tuple[bool, bool, bool]:
    found = gpu.batch_settings(model, shape, 256, 8192, by_sequence=by_sequence)
    assert found["max_blocks_per_request"] == (34 if found["auto_switch_to_flash"] else 0)
    return found["auto_switch_to_flash"], found["use_async_batching"], found["use_cuda_graph"]


def test_with_flash_attention_passes_overlap_and_are_recorded(caplog: pytest.LogCaptureFixture) -> None:
    assert settings(model()) == (True, True, True)
    four_bits, eight_bits = SimpleNamespace(load_in_4bit=True), SimpleNamespace(load_in_4bit=False)
    assert settings(model(quantization=four_bits)) == (True, True, True)
    # These look at the host in each pass.
    assert settings(model(quantization=eight_bits)) == (True, True, False)
    assert settings(model(parameters=("model.layers.0.mlp.experts.0.w1",))) == (True, True, False)
    assert settings(model(), by_sequence=True) == (True, False, False)
    assert not caplog.records


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"_supports_flash_attn": False}, "m does not support the usual kernels"),
        ({"_compatible_flash_implementations": ["a/b"]}, "m does not support the usual kernels"),
        ({"capability": (7, 5)}, "the GPU is older than Ampere"),
        ({"size": 512}, "heads of 256 numbers at most"),
        ({"plain": False}, "keep keys and values of different sizes"),
        ({"kernels": False}, "pip install 'forebay[gpu]'"),
    ],
)
def test_without_it_the_worker_warns_and_goes_on(
    change: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: change.get("capability", (9, 0)))
    monkeypatch.setattr(gpu, "is_flash_attn_2_available", lambda **_: change.get("kernels", True))
    fields = {name: value for name, value in change.items() if name.startswith("_")}
    shape = CacheShape(2, 2, change.get("size", 64), plain=change.get("plain", True))
    assert settings(model(**fields), shape) == (False, False, False)
    assert "without flash attention" in caplog.text
    assert reason in caplog.text


@pytest.mark.parametrize(
    ("free_gib", "slots", "chosen"), [(79, 8, "none"), (23, 4, "none"), (23, 6, "nf4"), (15, 1, "nf4")]
)
def test_auto_is_bf16_where_it_fits(tmp_path: Path, free_gib: int, slots: int, chosen: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    fits = "fit" if chosen == "none" else "do not fit"
    assert quantization_that_fits(tmp_path, free_gib * GIB, slots) == (
        chosen,
        f"15.0 GiB of weights in bf16 and a cache for {slots} requests of 8192 tokens {fits} into {free_gib}.0 GiB",
    )


def test_auto_is_nf4_where_nobody_knows(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    chosen, reason = quantization_that_fits(tmp_path, 79 * GIB, 1)
    assert chosen == "nf4"
    assert "it is not known how much memory bf16 takes" in reason


@pytest.mark.parametrize("tested", [True, False])
async def test_a_card_that_computes_otherwise_is_reported(
    tested: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def differs(*_: Any) -> None:
        raise EngineFault("its answers differ by 0.90 nats")

    monkeypatch.setattr(engine, "check_itself", differs)
    made = engine.TransformersEngine(InferenceSettings(_env_file=None))
    made._tested = tested
    plain: Any = SimpleNamespace(device="cuda:0")
    with nullcontext() if tested else pytest.raises(EngineFault):
        await made._check(plain, 8192, lambda line: None)
    assert ("on cuda:0: its answers differ by 0.90 nats" in caplog.text) == tested


def test_a_folder_of_tests_is_no_vllm_to_compare_with() -> None:
    installed = any("vllm" in names for names in importlib.metadata.packages_distributions().values())
    assert ("vLLM" in peers(Path("model"), "cpu", None)) == installed
    assert "vLLM" in peers(Path("model"), "cpu", "/opt/vllm/bin/python")
