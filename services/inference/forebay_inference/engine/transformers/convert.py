"""GGUF to safetensors: `python -m forebay_inference.engine.transformers.convert FILE FOLDER`, a process of its own."""

import sys
from pathlib import Path

import torch
from gguf import GGUFReader, TokenType
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def convert(source: Path, target: Path) -> None:
    """Write the model in the GGUF file `source` to the folder `target`, its weights as bf16."""
    place = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(**place)
    _mark_control_tokens(source, tokenizer)
    # Unpacked to bf16: the packed form can be neither saved nor quantized by bitsandbytes.
    model = AutoModelForCausalLM.from_pretrained(
        **place, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.config.name_or_path = ""
    tokenizer.save_pretrained(target)
    model.save_pretrained(target)


def _mark_control_tokens(source: Path, tokenizer: "AutoTokenizer") -> None:
    """Tell the tokenizer of every control token, since the library carries only the named ones over:
    without it the others would show in answers."""
    field = GGUFReader(source).get_field("tokenizer.ggml.token_type")
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
