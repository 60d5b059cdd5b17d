"""The arithmetic behind `forebay plan`: what of a GPU's memory goes where, and what settings fit into the rest.

`docs/sizing.md` explains it; a test holds the tables there to these functions, and others hold the functions to
what a real model takes. All sizes are in bytes, all token counts are whole sequences: prompt and answer together.
"""

from dataclasses import dataclass
from typing import Final

BF16_BYTES: Final = 2
FP32_BYTES: Final = 4

BLOCK_SIZE: Final = 64
"""bitsandbytes keeps one fp32 scale for so many 4-bit weights."""

RESERVE_BYTES: Final = 768 << 20
"""The CUDA context, kernels and library workspaces, and what the allocator cannot use."""

CACHE_SHARE: Final = 0.8
"""The part of the memory left by the weights that the engine gives the KV cache at most."""

PAGE_TOKENS: Final = 256
"""The KV cache of a sequence is made of pages of so many tokens on a GPU."""

SPARE_PAGES: Final = 2
"""Pages that the engine keeps for itself."""

QUANTIZATIONS: Final = ("none", "int8", "nf4")
"""From the most precise to the smallest; fp4 takes what nf4 does, and answers worse."""

BATCH_SIZES: Final = (2048, 1024, 512, 256, 128, 64, 32)
"""LLM_BATCH_SIZE, tried in this order. Beyond the first a pass takes longer, and no more prompts a second."""

MAX_SLOTS: Final = 64
"""Concurrency beyond which computing, not memory, is what limits the usual GPU."""

SMALLEST_CONTEXT: Final = 512
"""A cache that holds no sequence of so many tokens is of no use."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What of a model its memory depends on.

    `linear_params` are those of the layers' matrices, which quantization makes smaller, in `linear_rows` rows;
    `other_params` (embeddings, output head, norms) always stay in 16 bits. `stored_bytes` is set for a checkpoint
    that is quantized already (`carried` says how), which is loaded as it is.
    """

    name: str
    layers: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    vocabulary: int
    linear_params: int
    linear_rows: int
    other_params: int
    context_length: int
    carried: str | None = None
    stored_bytes: int | None = None

    @property
    def params(self) -> int:
        """All parameters."""
        return self.linear_params + self.other_params


@dataclass(frozen=True, slots=True)
class Fit:
    """What one quantization leaves room for. `slots` 0: not even one short request fits."""

    quantization: str
    weights_bytes: int
    kv_bytes_per_token: int
    cache_bytes: int
    activation_bytes: int
    free_bytes: int
    context: int
    slots: int
    batch_tokens: int
    queue_size: int


def weights_bytes(shape: ModelShape, quantization: str) -> int:
    """The weights in GPU memory, scales included."""
    if shape.stored_bytes is not None:
        return shape.stored_bytes
    match quantization:
        case "none":
            linear = shape.linear_params * BF16_BYTES
        case "int8":
            linear = shape.linear_params + shape.linear_rows * FP32_BYTES
        case _:
            linear = shape.linear_params // 2 + shape.linear_params // BLOCK_SIZE * FP32_BYTES
    return linear + shape.other_params * BF16_BYTES


def kv_bytes_per_token(shape: ModelShape) -> int:
    """Keys and values of one token over all layers, in 16 bits."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * BF16_BYTES


def activation_bytes(shape: ModelShape, batch_tokens: int, cache_tokens: int) -> int:
    """The most that one forward pass holds at once.

    For each of its tokens the hidden states, the feed-forward layer and the logits (in 16 and in 32 bits); besides,
    one layer's keys and values read from the whole cache, and the attention mask over it.
    """
    per_token = BF16_BYTES * (4 * shape.hidden + 3 * shape.intermediate) + shape.vocabulary * (BF16_BYTES + FP32_BYTES)
    read = cache_tokens * kv_bytes_per_token(shape) // shape.layers
    mask = BF16_BYTES * batch_tokens * (cache_tokens + batch_tokens)
    return batch_tokens * per_token + read + mask


def fit(
    shape: ModelShape, gpu_bytes: int, quantization: str, context: int, *, requests_per_slot: int, max_slots: int
) -> Fit:
    """How many requests of `context` tokens fit, and in which passes; a context that is too long is cut, as the
    engine does. `requests_per_slot` is how many requests one slot ends within REQUEST_TIMEOUT."""
    weights, per_token = weights_bytes(shape, quantization), kv_bytes_per_token(shape)
    free = max(0, gpu_bytes - RESERVE_BYTES - weights)
    most_tokens = (int(free * CACHE_SHARE) // (per_token * PAGE_TOKENS) - SPARE_PAGES) * PAGE_TOKENS
    context = min(context, max(most_tokens, 0))
    pages = -(-context // PAGE_TOKENS) * PAGE_TOKENS
    slots = min(most_tokens // pages, max_slots) if context >= SMALLEST_CONTEXT else 0
    tokens = slots * pages
    cache = tokens * per_token
    batch = next(
        (size for size in BATCH_SIZES if size >= slots and activation_bytes(shape, size, tokens) <= free - cache), 0
    )
    if not slots or not batch:
        return Fit(quantization, weights, per_token, 0, 0, free, context, 0, 0, 0)
    return Fit(
        quantization=quantization,
        weights_bytes=weights,
        kv_bytes_per_token=per_token,
        cache_bytes=cache,
        activation_bytes=activation_bytes(shape, batch, tokens),
        free_bytes=free,
        context=context,
        slots=slots,
        batch_tokens=batch,
        queue_size=slots * requests_per_slot,
    )


def recommended(fits: list[Fit], wanted_slots: int, wanted_context: int) -> Fit | None:
    """The most precise that serves `wanted_slots` requests of `wanted_context`; else the one that serves most."""
    usable = [one for one in fits if one.slots]
    whole = [one for one in usable if one.context >= wanted_context]
    enough = next((one for one in whole if one.slots >= wanted_slots), None)
    return enough or max(whole or usable, key=lambda one: one.slots * one.context, default=None)
