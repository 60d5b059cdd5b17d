"""A LoRA adapter of the default model, as PEFT writes one."""

import json
from pathlib import Path
from typing import Final

import numpy as np
from safetensors.numpy import save_file

RANK: Final = 4
_WIDTH, _LAYERS = 576, 30


def write_lora(folder: Path, seed: int) -> Path:
    """Write one to the new folder, other weights for each `seed`. Returns the folder."""
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "target_modules": ["o_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    random = np.random.default_rng(seed)
    weights = {}
    for layer in range(_LAYERS):
        name = f"base_model.model.model.layers.{layer}.self_attn.o_proj"
        for part, shape in (("lora_A", (RANK, _WIDTH)), ("lora_B", (_WIDTH, RANK))):
            weights[f"{name}.{part}.weight"] = random.normal(0, 0.15, shape).astype(np.float32)
    save_file(weights, folder / "adapter_model.safetensors")
    return folder
