"""GGUF to safetensors: `python -m forebay_inference.engine.transformers.convert FILE FOLDER`, a process of its own."""

import functools
import sys
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import TokenType
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

# The library reads the file's header three times and makes the table of names for each module. Here each is made once:
# 7 s of CPU time instead of 19 for 135M parameters.
gguf.GGUFReader = functools.cache(gguf.GGUFReader)
gguf.get_tensor_name_map = functools.cache(gguf.get_tensor_name_map)


def convert(source: Path, target: Path) -> None:
    """Write the model in the GGUF file `source` to the folder `target`, its weights as bf16.

    Raises:
        ValueError: weights are missing, or the model scales its rotary embedding in an unknown way.
    """
    reader = gguf.GGUFReader(str(source))
    scaling = rope_scaling(reader)
    _report(20)
    place = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(**place)
    _mark_control_tokens(reader, tokenizer)
    _report(40)
    # Unpacked to bf16: the packed form can be neither saved nor quantized by bitsandbytes.
    model, found = AutoModelForCausalLM.from_pretrained(
        **place, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True), output_loading_info=True
    )
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"the file lacks {len(missing)} weights, such as {missing[0]}")
    if scaling is not None:
        told = {name: value for name, value in scaling.items() if value is not None}
        model.config.rope_parameters = {**model.config.rope_parameters, **told}
    model.config.name_or_path = ""
    tokenizer.save_pretrained(target)
    model.save_pretrained(target)


def _report(percent: int) -> None:
    """Say how far it is, in the form of the library's bars, which follow."""
    print(f"{percent}%|", file=sys.stderr, flush=True)


def rope_scaling(reader: Any) -> dict[str, Any] | None:
    """How the rotary embedding is scaled, as fields of `rope_parameters`; the library reads that for one architecture
    alone. None where it is not.

    Raises:
        ValueError: in a way that the library has not.
    """
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}

    def told(name: str) -> Any:
        field = reader.get_field(name)
        return None if field is None else field.contents()

    architecture = told("general.architecture")
    prefix = f"{architecture}.rope.scaling"
    original = {"original_max_position_embeddings": told(f"{prefix}.original_context_length")}
    if architecture == "gpt-oss":
        return None
    if (factors := tensors.get("rope_freqs.weight")) is not None:
        return _of_llama3(torch.tensor(factors), told(f"{architecture}.rope.freq_base"))
    if (long := tensors.get("rope_factors_long.weight")) is not None:
        short = tensors["rope_factors_short.weight"]
        factor = {"attention_factor": told(f"{prefix}.attn_factor")}
        return {
            "rope_type": "longrope",
            "long_factor": long.tolist(),
            "short_factor": short.tolist(),
            **original,
            **factor,
        }
    match told(f"{prefix}.type"):
        case None | "none":
            return None
        case "linear":
            return {"rope_type": "linear", "factor": told(f"{prefix}.factor")}
        case "yarn":
            return {"rope_type": "yarn", "factor": told(f"{prefix}.factor"), **original}
        case other:
            raise ValueError(f"its rotary embedding is scaled by {other}, which the library does not read")


def _of_llama3(factors: torch.Tensor, theta: float) -> dict[str, Any] | None:
    """The file has the quotients of the frequencies alone; Llama 3.1 to 3.3 differ in the largest one."""
    if bool((factors == 1).all()):
        return None
    scaling = {
        "rope_type": "llama3",
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    size = 2 * factors.numel()
    config = LlamaConfig(
        hidden_size=size,
        num_attention_heads=1,
        max_position_embeddings=131_072,
        rope_parameters={**scaling, "rope_theta": theta},
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config)
    plain = 1 / theta ** (torch.arange(0, size, 2) / size)
    if not torch.allclose(plain / scaled, factors.float(), rtol=1e-3):
        raise ValueError("its rotary frequencies are none that the library has")
    return scaling


def _mark_control_tokens(reader: Any, tokenizer: "AutoTokenizer") -> None:
    """Tell the tokenizer of every control token, since the library carries only the named ones over:
    without it the others would show in answers."""
    field = reader.get_field("tokenizer.ggml.token_type")
    if field is None:
        return
    control = [index for index, kind in enumerate(field.contents()) if kind == TokenType.CONTROL]
    known = set(tokenizer.all_special_ids)
    missing = [tokenizer.convert_ids_to_tokens(index) for index in control if index not in known]
    if missing:
        tokenizer.add_special_tokens({"extra_special_tokens": missing})


if __name__ == "__main__":
    torch.set_num_threads(max(1, torch.get_num_threads() - 1))
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
