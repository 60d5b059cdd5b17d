"""Tiny checkpoints of every tested architecture: two layers, a window of 24 tokens, random weights that matter."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from support.checkpoint import byte_tokenizer

WINDOW = 24
ORIGINAL_CONTEXT = 64
"""Tokens of a sequence with the short frequencies of longrope."""

_LAYERS = {"num_hidden_layers": 2, "n_layer": 2, "num_layers": 2}
_WIDTHS = {
    "hidden_size": 32,
    "n_embd": 32,
    "word_embed_proj_dim": 32,
    "intermediate_size": 64,
    "ffn_dim": 64,
    "ffn_hidden_size": 64,
    "expert_ffn_hidden_size": 32,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "hidden_size_per_layer_input": 16,
}
_HEADS = {
    "num_attention_heads": 4,
    "n_head": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rotary_dim": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "query_pre_attn_scalar": 8,
    "attn_logit_softcapping": 2.0,
}
_EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_LENGTHS = {"max_position_embeddings": 512, "n_positions": 512, "sliding_window": WINDOW}
_FIELDS = _LAYERS | _WIDTHS | _HEADS | _EXPERTS | _LENGTHS | {"initializer_range": 0.3}

_FOUR_LAYERS = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_PARTICULAR: dict[str, dict[str, Any]] = {
    "gemma3n_text": _FOUR_LAYERS
    | {"intermediate_size": [64] * 4, "activation_sparsity_pattern": [0.5, 0.0, 0.5, 0.0], "laurel_rank": 8},
    "gemma4_text": _FOUR_LAYERS | {"global_head_dim": 16},
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "image_size": 28,
    "patch_size": 14,
}

_LONGROPE: dict[str, Any] = {
    "original_max_position_embeddings": ORIGINAL_CONTEXT,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": ORIGINAL_CONTEXT,
    },
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "longrope": ("phi3", _LONGROPE),
    "longrope and windows": ("phi3", _LONGROPE | {"sliding_window": WINDOW}),
    "dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}}),
    "yarn": (
        "qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10_000.0,
                "factor": 4.0,
                "original_max_position_embeddings": ORIGINAL_CONTEXT,
            }
        },
    ),
    "llama3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10_000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": ORIGINAL_CONTEXT,
            }
        },
    ),
    "windows of Qwen2": ("qwen2", {"layer_types": ["sliding_attention", "full_attention"], "use_sliding_window": True}),
    "biases of Llama": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "queries and keys with norms": ("cohere", {"use_qk_norm": True}),
    "multi-query Falcon": ("falcon", {"new_decoder_architecture": False, "multi_query": True}),
}
"""What configurations of tested architectures turn on: name to `model_type` and fields."""


def tiny_config(kind: str, **fields: Any) -> Any:
    """The configuration of a tiny model of `model_type` `kind`."""
    cls = CONFIG_MAPPING[kind]
    if f"{kind}_text" in _PARTICULAR or kind == "gemma3":
        text = tiny_config(f"{kind}_text").to_dict()
        silent = {"audio_config": None} if kind == "gemma4" else {}
        return cls(text_config=text, vision_config=_VISION, **silent)
    usual = cls()
    known = {
        name: value
        for name, value in _FIELDS.items()
        if (name in cls.__annotations__ or hasattr(usual, name)) and not isinstance(getattr(cls, name, None), property)
    }
    if getattr(usual, "sliding_window", None) is None:
        known.pop("sliding_window", None)
    if hasattr(usual, "kv_lora_rank"):
        known["num_key_value_heads"] = 4
    if kinds := list(dict.fromkeys(getattr(usual, "layer_types", None) or ())):
        known["layer_types"] = (kinds * 2)[:2]
    if hasattr(usual, "vocab_size_per_layer_input"):
        known["vocab_size_per_layer_input"] = len(tokenizer())
    known |= {"vocab_size": len(tokenizer()), "pad_token_id": 256, "bos_token_id": 256, "eos_token_id": 256}
    return cls(**known | _PARTICULAR.get(kind, {}) | fields)


@cache
def tokenizer() -> Any:
    """One tokenizer of single bytes for all."""
    return byte_tokenizer()


def write_checkpoint(folder: Path, kind: str, **fields: Any) -> Path:
    """A checkpoint of random weights in float32; the same each time. Returns the folder."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(kind, **fields), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms, biases and sinks begin as ones and zeros, which hide that they are there.
            if parameter.dim() == 1:
                parameter += torch.randn_like(parameter) * 0.1
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
THETA = 500_000.0


def llama3_quotients(size: int) -> Any:
    """[size / 2]: what a GGUF file of Llama 3.2 says of its rotary frequencies, for heads of `size` numbers."""
    config = LlamaConfig(hidden_size=size, num_attention_heads=1, rope_parameters={**LLAMA_3, "rope_theta": THETA})
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config)
    return (1 / THETA ** (torch.arange(0, size, 2) / size) / scaled).numpy()
