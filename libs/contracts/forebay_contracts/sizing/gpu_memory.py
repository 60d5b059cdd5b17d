"""The arithmetic of `forebay plan` and of MODEL_QUANTIZATION=auto: what fills a GPU's memory, and which settings fit.

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
"""The largest part of the memory beside the weights that the transformers engine gives to the KV cache and to what
the library's passes need."""

PAGE_TOKENS: Final = 256
"""Tokens in a page of the KV cache on a GPU."""

SPARE_PAGES: Final = 2
"""Pages that the transformers engine reserves."""

MAX_ROWS: Final = 1024
"""The most sequences in a pass of the transformers engine."""

USUAL_CONTEXT: Final = 8192
"""The context for which memory is planned where none is given. Many models take far more than requests ever use."""

QUANTIZATIONS: Final = ("none", "int8", "nf4")
"""From the most precise to the smallest. fp4 is left out: it takes the same memory as nf4 and answers worse."""

GGUF_BYTES: Final = {
    "BF16": 2.0,
    "Q8_0": 1.0626,
    "Q6_K": 0.8204,
    "Q5_K_M": 0.713,
    "Q4_K_M": 0.6118,
    "Q4_1": 0.625,
    "Q4_0": 0.5625,
    "Q3_K_M": 0.4995,
    "Q2_K": 0.3949,
}
"""Bytes a weight of llama.cpp's quantizations. Those of Q3_K_M to Q5_K_M and of Q2_K, which mix block types, are
llama.cpp's own figures for Llama 3.1 8B; the embeddings and the output head are quantized too."""

BATCH_SIZES: Final = (2048, 1024, 512, 256, 128, 64, 32)
"""LLM_BATCH_SIZE, tried in this order. A larger batch makes a pass longer and prefills no more tokens a second."""

USUAL_BATCH: Final = 256
"""A larger batch may not cost a slot, and a smaller one is taken only where this one does not fit."""

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
    heads: int
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


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """How an engine divides a GPU's memory.

    It quantizes to `quantizations` and takes at most `share` of the memory for all that it keeps. Its cache has pages
    of `page` tokens.
    """

    quantizations: tuple[str, ...]
    share: float
    page: int


ENGINES: Final = {
    "transformers": EnginePlan(QUANTIZATIONS, CACHE_SHARE, PAGE_TOKENS),
    # --gpu-memory-utilization and --mem-fraction-static, the default of each.
    "vllm": EnginePlan(("none", "fp8"), 0.9, 16),
    "sglang": EnginePlan(("none", "fp8"), 0.88, 1),
    "llamacpp": EnginePlan(tuple(GGUF_BYTES), 1.0, 256),
}


def weights_bytes(shape: ModelShape, quantization: str) -> int:
    """The weights in GPU memory, with their scales."""
    if shape.stored_bytes is not None:
        return shape.stored_bytes
    if quantization in GGUF_BYTES:
        return int(shape.params * GGUF_BYTES[quantization])
    match quantization:
        case "none":
            linear = shape.linear_params * BF16_BYTES
        case "fp8":
            linear = shape.linear_params
        case "int8":
            linear = shape.linear_params + shape.linear_rows * FP32_BYTES
        case _:
            linear = shape.linear_params // 2 + shape.linear_params // BLOCK_SIZE * FP32_BYTES
    return linear + shape.other_params * BF16_BYTES


def kv_bytes_per_token(shape: ModelShape) -> int:
    """Keys and values of one token over all layers, in 16 bits."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * BF16_BYTES


def activation_bytes(shape: ModelShape, batch_tokens: int, cache_tokens: int) -> int:
    """The largest memory of one forward pass under an attention mask.

    Each of its tokens needs hidden states, the feed-forward layer and logits (in 16 and in 32 bits). The pass also
    needs one layer's keys and values of `cache_tokens`, and the attention mask over them.
    """
    per_token = BF16_BYTES * (4 * shape.hidden + 3 * shape.intermediate) + shape.vocabulary * (BF16_BYTES + FP32_BYTES)
    read = cache_tokens * kv_bytes_per_token(shape) // shape.layers
    mask = BF16_BYTES * batch_tokens * (cache_tokens + batch_tokens)
    return batch_tokens * per_token + read + mask


def pass_bytes(shape: ModelShape, batch_tokens: int, context: int, *, flash: bool) -> int:
    """What the library behind the transformers engine keeps free for a pass of `batch_tokens`, whatever the cache's
    size: inputs, the states of one attention layer, the logits of each sequence, spare pages, and the attention mask
    of the new tokens. With `flash` attention there is no mask, and two passes are prepared at once."""
    peak_heads = 2 * shape.kv_heads if flash else 2 * shape.heads + shape.kv_heads
    heads = shape.heads + 2 * shape.kv_heads + peak_heads
    inputs = 2 * (48 + 4 * blocks_of(context)) if flash else 48
    per_token = BF16_BYTES * (shape.hidden + heads * shape.head_dim) + inputs
    logits = min(batch_tokens, MAX_ROWS) * (BF16_BYTES * shape.hidden + FP32_BYTES * shape.vocabulary)
    mask = 0 if flash else BF16_BYTES * batch_tokens**2
    return batch_tokens * per_token + logits + SPARE_PAGES * PAGE_TOKENS * kv_bytes_per_token(shape) + mask


def bytes_per_cached_token(shape: ModelShape, batch_tokens: int, *, flash: bool) -> int:
    """A token of the transformers engine's cache, with what one layer's attention needs to read it: copies of its keys
    and values (without `flash` attention one for each head), its index, and its column of the attention mask."""
    peak_heads = 2 * shape.kv_heads if flash else 2 * shape.heads + shape.kv_heads
    read = BF16_BYTES * peak_heads * shape.head_dim + (16 if flash else 8)
    return kv_bytes_per_token(shape) + read + (0 if flash else BF16_BYTES * batch_tokens)


def blocks_of(context: int) -> int:
    """The most blocks that a sequence may have in a pass that only decodes; even, as the library makes it."""
    blocks = context // PAGE_TOKENS + 1
    return blocks + blocks % 2


def cache_tokens(
    shape: ModelShape, gpu_bytes: int, quantization: str, batch_tokens: int, context: int, *, engine: str, flash: bool
) -> int:
    """The most tokens that the KV cache can have, in whole pages."""
    plan, weights = ENGINES[engine], weights_bytes(shape, quantization)
    if engine == "transformers":
        room = int((gpu_bytes - RESERVE_BYTES - weights) * plan.share)
        room -= pass_bytes(shape, batch_tokens, context, flash=flash)
        per_token = bytes_per_cached_token(shape, batch_tokens, flash=flash)
    else:
        room = int(gpu_bytes * plan.share) - RESERVE_BYTES - weights - activation_bytes(shape, batch_tokens, 0)
        per_token = kv_bytes_per_token(shape)
    return max(0, room // (per_token * plan.page)) * plan.page


def fit(
    shape: ModelShape,
    gpu_bytes: int,
    quantization: str,
    context: int,
    *,
    requests_per_slot: int,
    max_slots: int,
    engine: str = "transformers",
    flash: bool = True,
) -> Fit:
    """How many requests of `context` tokens fit, and the batch for them. A context that is too long is cut, as the
    engine cuts it. `requests_per_slot` is the number of requests that one slot finishes within REQUEST_TIMEOUT."""

    def of_batch(batch: int) -> Fit:
        most = cache_tokens(shape, gpu_bytes, quantization, batch, context, engine=engine, flash=flash)
        page, cut = ENGINES[engine].page, min(context, most)
        pages = -(-cut // page) * page
        slots = min(most // pages, max_slots, batch) if cut >= SMALLEST_CONTEXT else 0
        cache = slots * pages * per_token
        activations = activation_bytes(shape, batch, slots * pages if engine == "transformers" and not flash else 0)
        if not slots or activations > free - cache:
            return Fit(quantization, weights, per_token, 0, 0, free, cut, 0, 0, 0)
        queue = slots * requests_per_slot
        return Fit(quantization, weights, per_token, cache, activations, free, cut, slots, batch, queue)

    weights, per_token = weights_bytes(shape, quantization), kv_bytes_per_token(shape)
    free = max(0, gpu_bytes - RESERVE_BYTES - weights)
    fits = {batch: of_batch(batch) for batch in BATCH_SIZES}
    usual = fits[USUAL_BATCH]
    if not usual.slots:
        return next((one for one in fits.values() if one.slots), usual)
    return next(one for one in fits.values() if (one.slots, one.context) == (usual.slots, usual.context))


def recommended(fits: list[Fit], wanted_slots: int, wanted_context: int) -> Fit | None:
    """The most precise one that serves `wanted_slots` requests of `wanted_context`, else the one that serves most."""
    usable = [one for one in fits if one.slots]
    whole = [one for one in usable if one.context >= wanted_context]
    enough = next((one for one in whole if one.slots >= wanted_slots), None)
    return enough or max(whole or usable, key=lambda one: one.slots * one.context, default=None)
