"""The shape of a model, from its `config.json` and weight files on this machine or from a few numbers."""

import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from forebay_contracts.sizing.gpu_memory import BF16_BYTES, ModelShape
from forebay_contracts.wire.errors import ConfigurationError

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B?)?", re.IGNORECASE)
_PARAMS = re.compile(r"(\d+(?:\.\d+)?)\s*([MB])", re.IGNORECASE)
_POWERS: Final = {"K": 1, "M": 2, "G": 3, "T": 4}
_CONTEXT_FIELDS: Final = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
_EXPERT_FIELDS: Final = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_BITS_OF_METHOD: Final = {"fp8": 8, "awq": 4, "mxfp4": 4}
_MAX_HEADER_BYTES: Final = 100_000_000

# The usual model of a number of parameters:
# layers, heads of keys and values, their size, hidden size, feed-forward size, vocabulary.
_TYPICAL: Final = (
    (0.5e9, (24, 2, 64, 896, 4864, 151_936)),
    (1.2e9, (16, 8, 64, 2048, 8192, 128_256)),
    (3.2e9, (28, 8, 128, 3072, 8192, 128_256)),
    (8.0e9, (32, 8, 128, 4096, 14_336, 128_256)),
    (14.8e9, (48, 8, 128, 5120, 13_824, 152_064)),
    (32.8e9, (64, 8, 128, 5120, 27_648, 152_064)),
    (70.6e9, (80, 8, 128, 8192, 28_672, 128_256)),
)
_TYPICAL_CONTEXT: Final = 131_072


def parse_size(text: str) -> int:
    """`24GiB` (or `24G`, or `24`) and `24GB` in bytes: binary with an i or without a B, else decimal.

    Raises:
        ConfigurationError: it is no size.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise ConfigurationError(f"{text!r} is no amount of memory: write 24GiB or 24GB")
    number, unit, binary = found.groups()
    decimal = not binary and text.strip().upper().endswith("B")
    return int(float(number) * (1000 if decimal else 1024) ** _POWERS[(unit or "G").upper()])


def parse_params(text: str) -> int | None:
    """`7B` and `135M` as a number of parameters; None where it is neither."""
    found = _PARAMS.fullmatch(text.strip())
    return None if found is None else int(float(found[1]) * (1e9 if found[2].upper() == "B" else 1e6))


def of_params(
    name: str, params: int, layers: int | None = None, kv_heads: int | None = None, head_dim: int | None = None
) -> ModelShape:
    """A model of `params` parameters. What is not given comes from the usual model of the nearest size."""
    _, usual = min(_TYPICAL, key=lambda one: abs(math.log(one[0] / params)))
    hidden, intermediate, vocabulary = usual[3:]
    # Large models have an output head beside the embeddings. Small models use one matrix for both.
    other = min(vocabulary * hidden * (1 if params < 4e9 else 2), params // 2)
    layers = layers or usual[0]
    return ModelShape(
        name=name,
        layers=layers,
        heads=hidden // (head_dim or usual[2]),
        kv_heads=kv_heads or usual[1],
        head_dim=head_dim or usual[2],
        hidden=hidden,
        intermediate=intermediate,
        vocabulary=vocabulary,
        linear_params=params - other,
        linear_rows=layers * (3 * hidden + 3 * intermediate),
        other_params=other,
        context_length=_TYPICAL_CONTEXT,
    )


def of_folder(name: str, folder: Path) -> ModelShape:
    """The model in `folder`: its shape from `config.json`, its parameters from the weight files if they are there.

    Raises:
        ConfigurationError: `config.json` cannot be read or lacks a field.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as exc:
        raise ConfigurationError(f"{folder / 'config.json'} cannot be read: {exc}") from exc
    files = sorted(folder.glob("*.safetensors"))
    return of_config(name, config, files)


def of_config(name: str, config: dict[str, Any], files: Sequence[Path] = ()) -> ModelShape:
    """The model of `config`, the content of its `config.json`, and of its weight `files`.

    Raises:
        ConfigurationError: it lacks a field.
    """
    try:
        shape = _of_config(name, config.get("text_config") or config)
    except (KeyError, TypeError, AttributeError, StopIteration) as exc:
        raise ConfigurationError(
            f"the config.json of {name} does not say how large the model is ({exc!r}): give its size, as --model 8B "
            "with --layers, --kv-heads and --head-dim"
        ) from exc
    carried = config.get("quantization_config")
    if carried is None:
        return _with_weights(shape, files) if files else shape
    method = str(carried.get("quant_method", "quantized"))
    if files:
        return replace(shape, carried=method, stored_bytes=sum(file.stat().st_size for file in files))
    bits = carried.get("bits") or _BITS_OF_METHOD.get(method) or (4 if carried.get("load_in_4bit") else None)
    if bits is None:
        raise ConfigurationError(f"{name} is quantized already ({method}), and its weight files are missing")
    # A scale of 16 bits, and of 4-bit weights a zero point, for each 128 weights.
    stored = int(shape.linear_params * (bits / 8 + 0.02)) + shape.other_params * BF16_BYTES
    return replace(shape, carried=method, stored_bytes=stored)


def find_folder(model: str, data_dir: Path) -> Path | None:
    """The folder of `model` on this machine: of that name, in Forebay's store, or in the cache of the hub's client."""
    path = Path(os.path.expanduser(model))
    if (path / "config.json").is_file():
        return path
    slug = model.replace("/", "--")
    hub = Path(os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME", "~/.cache/huggingface")) / "hub")
    found = list((data_dir / "models").glob(f"{slug}-v*/config.json"))
    for root in (data_dir / "hub", Path(os.path.expanduser(hub))):
        found += root.glob(f"models--{slug}/snapshots/*/config.json")
    return max(found, key=lambda config: config.stat().st_mtime).parent if found else None


def _of_config(name: str, config: dict[str, Any]) -> ModelShape:
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads
    intermediate, vocabulary = config["intermediate_size"], config["vocab_size"]
    experts = next((config[field] for field in _EXPERT_FIELDS if config.get(field)), 1)
    expert_size = config.get("moe_intermediate_size") or intermediate
    attention = 2 * hidden * head_dim * (heads + kv_heads)
    attention_rows = head_dim * (heads + 2 * kv_heads) + hidden
    feed_forward = 3 * hidden * expert_size * experts + (hidden * experts if experts > 1 else 0)
    expert_params = layers * feed_forward if experts > 1 else 0
    if latent := config.get("kv_lora_rank"):
        # Keys and values are kept compressed, as one head.
        kv_heads, head_dim = 1, max(latent, config["qk_rope_head_dim"])
    tied = config.get("tie_word_embeddings", True)
    return ModelShape(
        name=name,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        hidden=hidden,
        intermediate=intermediate,
        vocabulary=vocabulary,
        linear_params=layers * (attention + feed_forward) - expert_params,
        linear_rows=layers * (attention_rows + (2 * expert_size + hidden if experts == 1 else 0)),
        other_params=vocabulary * hidden * (1 if tied else 2) + (2 * layers + 1) * hidden + expert_params,
        expert_params=expert_params,
        context_length=next(config[field] for field in _CONTEXT_FIELDS if field in config),
    )


def _with_weights(shape: ModelShape, files: Sequence[Path]) -> ModelShape:
    """`shape` with its parameters counted from the headers of the weight files."""
    linear = rows = other = experts = 0
    for name, tensor in _tensors(files):
        size = math.prod(tensor)
        of_experts = ".experts." in name or len(tensor) == 3
        if len(tensor) == 2 and not of_experts and "embed" not in name and "lm_head" not in name:
            linear, rows = linear + size, rows + tensor[0]
        else:
            other, experts = other + size, experts + (size if of_experts else 0)
    return replace(shape, linear_params=linear, linear_rows=rows, other_params=other, expert_params=experts)


def _tensors(files: Sequence[Path]) -> Iterator[tuple[str, list[int]]]:
    # A file starts with 8 bytes of length, then JSON (https://huggingface.co/docs/safetensors).
    for file in files:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if length > _MAX_HEADER_BYTES:
                raise ConfigurationError(f"{file} is no safetensors file")
            header = json.loads(opened.read(length))
        for name, tensor in header.items():
            if name != "__metadata__":
                yield name, tensor["shape"]
