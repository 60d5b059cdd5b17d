"""Checkpoints that are broken, incomplete or of a kind that cannot be served: each is refused in one sentence."""

import gc
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter, TokenType
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from forebay_contracts.settings import InferenceSettings
from forebay_contracts.wire.errors import ConfigurationError
from forebay_inference.engine.transformers.convert import convert
from forebay_inference.engine.transformers.engine import TransformersEngine
from forebay_inference.engine.transformers.loading import Loaded, load
from forebay_inference.engine.transformers.self_check import PlainModel, check_itself
from support.architectures import LLAMA_3, THETA, llama3_quotients, write_checkpoint

Change = Callable[[Path], object]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> Iterator[None]:
    """Loading collects garbage, of all that is imported."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("whole"), "llama")


def loaded(folder: Path, quantization: str = "auto", **options: Any) -> Loaded:
    return load(folder, quantization, "cpu", lambda line: None, **options)


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    """Change the tensors of a folder."""

    def changed(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})

    return changed


def config(**fields: Any) -> Change:
    """Add fields to a folder's config.json."""

    def changed(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return changed


def quantized(method: str, **fields: Any) -> Change:
    return config(quantization_config={"quant_method": method, **fields})


def of_kind(kind: str, **fields: Any) -> Change:
    """Another config.json, with the defaults of an architecture."""
    return lambda folder: (folder / "config.json").write_text(json.dumps({"model_type": kind, **fields}))


def without_layer(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if ".layers.1." in name]:
        del tensors[name]


def cut(keep: int) -> Change:
    return lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:keep])


def without_shard(folder: Path) -> None:
    names = list(load_file(folder / WEIGHTS))
    (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
    shards = {name: f"model-0000{1 + (name == names[-1])}-of-00002.safetensors" for name in names}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": shards}))


def remove(*names: str) -> Change:
    return lambda folder: [(folder / name).unlink() for name in names]


REFUSED: dict[str, tuple[Change, str]] = {
    "a layer is missing": (weights(without_layer), r"missing weights: model\.layers\.1\.\S+, .* and \d more$"),
    "the head is missing": (weights(lambda tensors: tensors.pop("lm_head.weight")), "missing weights: lm_head.weight$"),
    "a tensor too many": (weights(lambda tensors: tensors.update(magic=torch.zeros(1))), "unexpected weights: magic$"),
    "a wrong shape": (
        weights(lambda tensors: tensors.update({"model.norm.weight": torch.zeros(3)})),
        r"weights of the wrong shape: model\.norm\.weight$",
    ),
    "cut off": (cut(20_000), "cannot be loaded: .*incomplete"),
    "cut off in its header": (cut(20), "cannot be loaded: .*header"),
    "empty": (cut(0), "cannot be loaded: .*header"),
    "a shard is missing": (without_shard, "model-00002-of-00002.safetensors"),
    "no weights": (remove(WEIGHTS), "no file named model.safetensors"),
    "no tokenizer": (remove("tokenizer.json", "tokenizer_config.json"), "holds no tokenizer that can be read"),
    "an adapter": (lambda folder: (folder / "adapter_config.json").write_text("{}"), "holds an adapter; merge it"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "not a valid JSON file"),
    "no architecture": (lambda folder: (folder / "config.json").write_text("{}"), "model_type"),
    "an unknown architecture": (of_kind("zorp"), "does not recognize this architecture"),
    "code of its own": (of_kind("zorp", auto_map={"AutoConfig": "zorp.Config"}), "custom code"),
    "an unknown quantization": (quantized("zorp"), "quantized by zorp, which"),
    "a nameless quantization": (config(quantization_config={"bits": 4}), "does not say by which method"),
    "GPTQ": (quantized("gptq", bits=4), "requires optimum"),
    "AWQ": (quantized("awq", bits=4), "requires gptqmodel"),
    "HQQ": (quantized("hqq"), "HQQ version"),
    "quanto": (quantized("quanto", weights="int8"), "optimum-quanto"),
    "torchao": (quantized("torchao", quant_type="int4_weight_only"), "torchao"),
    "compressed-tensors": (quantized("compressed-tensors"), "compressed-tensors"),
    "T5": (of_kind("t5"), "t5 is an encoder-decoder model"),
    "Whisper": (of_kind("whisper"), "encoder-decoder"),
    "Qwen2.5-VL": (of_kind("qwen2_5_vl"), "qwen2_5_vl is no text generation model"),
    "Llava": (of_kind("llava"), "no text generation model"),
    "RWKV": (of_kind("rwkv"), "rwkv is not among the tested architectures"),
    "LFM2": (of_kind("lfm2", layer_types=["conv", "full_attention"], num_hidden_layers=2), "layers of conv"),
    "Mamba": (of_kind("mamba"), "layers of linear_attention"),
    "Jamba": (of_kind("jamba"), "layers of linear_attention"),
    "Bamba": (of_kind("bamba"), "layers of linear_attention"),
    "Qwen3-Next": (of_kind("qwen3_next"), "layers of linear_attention"),
    "Qwen3.5": (of_kind("qwen3_5"), "layers of linear_attention"),
    "Llama 4": (of_kind("llama4"), "layers of chunked_attention"),
    "DeepSeek V3.2": (of_kind("deepseek_v32"), "layers of indexed_attention"),
    "Bloom": (of_kind("bloom"), "bloom places its tokens with ALiBi"),
    "MPT": (of_kind("mpt"), "ALiBi"),
    "Falcon with ALiBi": (of_kind("falcon", alibi=True), "ALiBi"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_in_one_sentence(tmp_path: Path, whole: Path, name: str) -> None:
    change, expected = REFUSED[name]
    folder = Path(shutil.copytree(whole, tmp_path / "model"))
    change(folder)
    with pytest.raises(ConfigurationError, match=expected) as refused:
        loaded(folder)
    assert "\n" not in str(refused.value)


def test_what_is_harmless_is_loaded(tmp_path: Path, whole: Path) -> None:
    """Tables that old checkpoints hold, a layer that predicts a further token, and a head that is the embedding."""
    folder = Path(shutil.copytree(whole, tmp_path / "model"))
    tables = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "attn.masked_bias", "attention.bias")
    weights(lambda tensors: tensors.update({f"model.layers.0.self_attn.{name}": torch.zeros(4) for name in tables}))(
        folder
    )
    weights(lambda tensors: tensors.update({"model.layers.2.eh_proj.weight": torch.zeros(4)}))(folder)
    with pytest.raises(ConfigurationError, match=r"unexpected weights: model\.layers\.2\.eh_proj\.weight$"):
        loaded(folder, "none")
    config(num_nextn_predict_layers=1)(folder)
    assert loaded(folder, "none").quantization == "none"
    weights(lambda tensors: tensors.pop("lm_head.weight"))(folder)
    config(tie_word_embeddings=True)(folder)
    assert loaded(folder, "none").quantization == "none"


@pytest.mark.parametrize(
    ("kind", "actual"), [("llama", "nf4"), ("mixtral", "nf4 (experts bf16)"), ("gemma3", "nf4"), ("falcon", "none")]
)
def test_the_quantization_is_the_actual_one(tmp_path: Path, kind: str, actual: str) -> None:
    """bitsandbytes takes neither experts, which lie in one tensor, nor the linear layers of Falcon's own class."""
    assert loaded(write_checkpoint(tmp_path, kind), "nf4").quantization == actual


def test_a_checkpoint_of_4_bits_keeps_its_quantization(tmp_path: Path, whole: Path) -> None:
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(whole, quantization_config=four_bits).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(whole / name, tmp_path)
    assert loaded(tmp_path).quantization == "nf4"


def engine_for(folder: Path) -> TransformersEngine:
    return TransformersEngine(
        InferenceSettings(
            _env_file=None,
            default_model=str(folder),
            model_quantization="none",
            model_device="cpu",
            llm_batch_size=32,
            allow_untested_models=True,
        )
    )


async def test_an_untested_architecture_is_served_if_it_passes_the_check(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "phimoe")
    with pytest.raises(ConfigurationError, match="phimoe is not among the tested"):
        loaded(tmp_path)
    engine, lines = engine_for(tmp_path), list[str]()
    try:
        await engine.start(lines.append)
        assert any("from plain forward passes" in line for line in lines)
        assert engine._batch is not None
        torch.manual_seed(1)
        other = write_checkpoint(tmp_path / "other", "llama", vocab_size=257)
        plain = PlainModel(loaded(other, "none").model)
        with pytest.raises(Exception, match="differ from those of plain forward passes by"):
            await check_itself(engine, plain, 512, 32, lines.append)
    finally:
        await engine.close()


async def test_an_attention_that_is_not_computed_here_is_refused(tmp_path: Path) -> None:
    engine = engine_for(write_checkpoint(tmp_path, "diffllama"))
    try:
        with pytest.raises(ConfigurationError, match="attends to something else than the keys and values"):
            await engine.start(lambda line: None)
    finally:
        await engine.close()


def write_gguf(path: Path, *, layers: int, written: int) -> Path:
    """A tiny Llama of `layers` layers of which `written` are in the file, with rotary factors of Llama 3."""
    vocabulary = [*map(chr, range(33, 127)), "ab", "<|end|>"]
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(256)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(THETA)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([TokenType.NORMAL] * (len(vocabulary) - 1) + [TokenType.CONTROL])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(len(vocabulary) - 1)
    shapes = {"token_embd": (len(vocabulary), 32), "output": (len(vocabulary), 32), "output_norm": (32,)}
    for layer in range(written):
        shapes |= {f"blk.{layer}.{name}": (32,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{layer}.{name}": (32, 32) for name in ("attn_q", "attn_output")}
        shapes |= {f"blk.{layer}.{name}": (16, 32) for name in ("attn_k", "attn_v")}
        shapes |= {f"blk.{layer}.{name}": (64, 32) for name in ("ffn_gate", "ffn_up")}
        shapes |= {f"blk.{layer}.ffn_down": (32, 64)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
    writer.add_tensor("rope_freqs.weight", llama3_quotients(8).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_converted_with_its_rotary_factors_and_not_without_a_layer(tmp_path: Path) -> None:
    convert(write_gguf(tmp_path / "whole.gguf", layers=2, written=2), tmp_path / "whole")
    made = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert made["rope_parameters"] == pytest.approx(LLAMA_3 | {"rope_theta": THETA})
    with pytest.raises(ValueError, match=r"lacks 9 weights, such as model\.layers\.1\."):
        convert(write_gguf(tmp_path / "part.gguf", layers=2, written=1), tmp_path / "part")
