"""The arithmetic of `forebay plan`: what fills a GPU's memory, and which settings fit into it.

`docs/sizing.md` explains it. Tests compare the tables there with these functions, and the functions with what a real
model takes. All sizes are in bytes; all token counts are of whole sequences, prompt and answer together.
"""

from dataclasses import dataclass
from typing import Final

BF16_BYTES: Final = 2
FP32_BYTES: Final = 4

BLOCK_SIZE: Final = 64
"""4-bit weights for each fp32 scale of bitsandbytes."""

RESERVE_BYTES: Final = 768 << 20
"""The CUDA context, kernels, the workspaces of libraries, and fragmentation of the allocator."""

CACHE_SHARE: Final = 0.8
"""The largest part of the memory beside the weights that the engine gives to the KV cache."""

PAGE_TOKENS: Final = 256
"""Tokens in a page of the KV cache on a GPU."""

SPARE_PAGES: Final = 2
"""Pages that the engine reserves."""

QUANTIZATIONS: Final = ("none", "int8", "nf4")
"""From the most precise to the smallest. fp4 is left out: it takes the same memory as nf4 and answers worse."""

BATCH_SIZES: Final = (2048, 1024, 512, 256, 128, 64, 32)
"""LLM_BATCH_SIZE, tried in this order. A larger batch makes a pass longer and prefills no more tokens a second."""

MAX_SLOTS: Final = 64
"""The most concurrent requests: beyond it, compute limits the usual GPU and memory does not."""

SMALLEST_CONTEXT: Final = 512
"""The shortest context that is recommended."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The properties of a model that its memory depends on.

    `linear_params` are those of the layers' matrices, which quantization makes smaller, in `linear_rows` rows.
    `other_params` (embeddings, output head, norms, and the `expert_params` of a mixture) always stay in 16 bits. A
    checkpoint that is quantized already (`carried` says how) has its size in `stored_bytes` and is loaded as it is.
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
    expert_params: int = 0
    carried: str | None = None
    stored_bytes: int | None = None

    @property
    def params(self) -> int:
        """All parameters."""
        return self.linear_params + self.other_params


@dataclass(frozen=True, slots=True)
class Fit:
    """What one quantization leaves room for. With 0 `slots` not even one short request fits."""

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

    @property
    def settings(self) -> dict[str, str]:
        """The settings for it."""
        return {
            "MODEL_QUANTIZATION": self.quantization,
            "MAX_CONCURRENT_REQUESTS": str(self.slots),
            "LLM_BATCH_SIZE": str(self.batch_tokens),
            "MAX_QUEUE_SIZE": str(self.queue_size),
        }


def weights_bytes(shape: ModelShape, quantization: str) -> int:
    """The weights in GPU memory, with their scales."""
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
    """The largest memory of one forward pass.

    Each of its tokens needs hidden states, the feed-forward layer and logits (in 16 and in 32 bits). The pass also
    needs one layer's keys and values of the whole cache, and the attention mask over it.
    """
    per_token = BF16_BYTES * (4 * shape.hidden + 3 * shape.intermediate) + shape.vocabulary * (BF16_BYTES + FP32_BYTES)
    read = cache_tokens * kv_bytes_per_token(shape) // shape.layers
    mask = BF16_BYTES * batch_tokens * (cache_tokens + batch_tokens)
    return batch_tokens * per_token + read + mask


def fit(
    shape: ModelShape, gpu_bytes: int, quantization: str, context: int, *, requests_per_slot: int, max_slots: int
) -> Fit:
    """How many requests of `context` tokens fit, and the batch for them. A context that is too long is cut, as the
    engine cuts it. `requests_per_slot` is the number of requests that one slot finishes within REQUEST_TIMEOUT."""
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
    activations, queue = activation_bytes(shape, batch, tokens), slots * requests_per_slot
    return Fit(quantization, weights, per_token, cache, activations, free, context, slots, batch, queue)


def recommended(fits: list[Fit], wanted_slots: int, wanted_context: int) -> Fit | None:
    """The most precise one that serves `wanted_slots` requests of `wanted_context`, else the one that serves most."""
    usable = [one for one in fits if one.slots]
    whole = [one for one in usable if one.context >= wanted_context]
    enough = next((one for one in whole if one.slots >= wanted_slots), None)
    return enough or max(whole or usable, key=lambda one: one.slots * one.context, default=None)
