"""A GGUF file that is made in a moment: a tiny Llama of random weights, with a vocabulary of single bytes."""

from pathlib import Path

import numpy as np
from gguf import GGUFType, GGUFWriter, Keys, PoolingType, TokenType
from tokenizers import pre_tokenizers

END = "<|end|>"
_WIDTH, _LAYERS = 32, 2
_TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"


def write_tiny_gguf(path: Path, *, ranks: bool = False, context: int = 512) -> Path:
    """Write it to `path`; the same weights each time. Most of its answers are no UTF-8. Returns the path.

    With `ranks`, it has a classifier. `context` is in tokens.
    """
    vocabulary = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", END]
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(_LAYERS)
    writer.add_context_length(context)
    writer.add_embedding_length(_WIDTH)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([TokenType.NORMAL] * (len(vocabulary) - 1) + [TokenType.CONTROL])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(len(vocabulary) - 1)
    writer.add_chat_template(_TEMPLATE)
    shapes = {"token_embd": (len(vocabulary), _WIDTH), "output": (len(vocabulary), _WIDTH), "output_norm": (_WIDTH,)}
    if ranks:
        writer.add_pooling_type(PoolingType.RANK)
        shapes["cls.output"] = (1, _WIDTH)
    for layer in range(_LAYERS):
        shapes |= {f"blk.{layer}.{name}": (_WIDTH,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{layer}.{name}": (_WIDTH, _WIDTH) for name in ("attn_q", "attn_output")}
        shapes |= {f"blk.{layer}.{name}": (16, _WIDTH) for name in ("attn_k", "attn_v")}
        shapes |= {f"blk.{layer}.{name}": (64, _WIDTH) for name in ("ffn_gate", "ffn_up")}
        shapes |= {f"blk.{layer}.ffn_down": (_WIDTH, 64)}
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        weights = np.ones(shape) if len(shape) == 1 else random.normal(0, 0.5, shape)
        # Multiples of 1/128 below 2 are the same in bf16, to which the store converts.
        weights = np.clip(np.round(weights * 128) / 128, -1.0, 1.0)
        writer.add_tensor(f"{name}.weight", weights.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_tiny_lora(path: Path, seed: int) -> Path:
    """Write a LoRA adapter of the tiny model to `path`, other weights for each `seed`. Returns the path."""
    writer = GGUFWriter(path, "llama")
    writer.add_type(GGUFType.ADAPTER)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, 8.0)
    random = np.random.default_rng(seed)
    for layer in range(_LAYERS):
        for part, shape in (("lora_a", (4, _WIDTH)), ("lora_b", (_WIDTH, 4))):
            weights = random.normal(0, 0.5, shape).astype(np.float32)
            writer.add_tensor(f"blk.{layer}.attn_output.weight.{part}", weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
