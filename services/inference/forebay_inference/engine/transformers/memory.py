"""How much memory there is, and how large the KV cache is to be."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil
import torch
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from forebay_contracts.sizing.gpu_memory import CACHE_SHARE, MAX_ROWS, PAGE_TOKENS, blocks_of
from forebay_contracts.wire.errors import ConfigurationError
from forebay_inference.engine.transformers.cache_shape import CacheShape

# On a CPU the cache shares its memory with everything else on the machine; on a GPU it is what the memory is for.
_CPU_SHARE: Final = 0.4
_CPU_LIMIT_BYTES: Final = 1 << 30
_CPU_PAGE_TOKENS: Final = 32


@dataclass(frozen=True, slots=True)
class CachePlan:
    """The KV cache: `blocks` of `page_size` tokens, and the longest sequence that one request may have."""

    blocks: int
    page_size: int
    context_length: int

    @property
    def tokens(self) -> int:
        """How many tokens fit in all."""
        return self.blocks * self.page_size


def page_tokens(device: torch.device) -> int:
    """Tokens in a page of the KV cache."""
    return _CPU_PAGE_TOKENS if device.type == "cpu" else PAGE_TOKENS


def settings_on_gpu(max_batch_tokens: int, context_length: int, *, flash: bool) -> dict[str, Any]:
    """What the library's ContinuousBatchingConfig must say on a GPU, besides the number of blocks.

    It decides itself on CUDA graphs and on preparing a pass while the one before is computed: both where there is
    flash attention, and none where a mask would have to be padded and copied.
    """
    return {
        "page_size": PAGE_TOKENS,
        "max_batch_tokens": max_batch_tokens,
        "max_requests_per_batch": min(max_batch_tokens, MAX_ROWS),
        "max_memory_percent": CACHE_SHARE,
        # Its default, 32, would take passes with a sequence of more than 8192 tokens off the fast path for decoding.
        "max_blocks_per_request": blocks_of(context_length) if flash else 0,
    }


def plan_cache(
    shape: CacheShape,
    dtype: torch.dtype,
    device: torch.device,
    slots: int,
    context_length: int,
    *,
    affordable: int | None = None,
) -> CachePlan:
    """Size the cache for `slots` sequences of `context_length` tokens, or for what the free memory holds of that.

    `affordable` is the most blocks that fit, where it is known. The context is cut where not even one sequence fits,
    so that a request that is accepted can always be run.

    Raises:
        ConfigurationError: not even a short sequence fits.
    """
    page_size = page_tokens(device)
    wanted = slots * -(-context_length // page_size)
    if affordable is None:
        per_block, budget = bytes_per_token(shape, dtype) * page_size, cache_budget(device)
        # The library keeps two blocks of its own besides.
        affordable = budget // per_block - 2
        if affordable < 1:
            raise ConfigurationError(
                f"no memory for the KV cache on {device}: {budget >> 20} MiB may be used for it, "
                f"and {page_size} tokens take {per_block >> 10} KiB"
            )
    blocks = min(wanted, affordable)
    return CachePlan(blocks, page_size, min(context_length, blocks * page_size))


def bytes_per_token(shape: CacheShape, dtype: torch.dtype) -> int:
    """Bytes that the keys and values of one token take over all layers."""
    return 2 * shape.layers * shape.heads * shape.size * int(dtype.itemsize)


def cache_budget(device: torch.device) -> int:
    """Bytes that the KV cache may take on a CPU, the weights being loaded already."""
    return min(_CPU_LIMIT_BYTES, int(available_memory() * _CPU_SHARE))


def blocks_on_gpu(config: Any, settings: Any, dtype: torch.dtype, helper: Any, *, slices_logits: bool) -> int:
    """The most blocks of cache for which the library finds room on a GPU, beside the weights and what its passes need.

    The attention mask of a pass without flash attention grows with the cache and with LLM_BATCH_SIZE. The library
    raises MemoryError for a cache that leaves no room for it. So the library itself is asked: a cache on the device
    `meta`, which takes no memory, with as many blocks as fit.

    `config` is the text model's, `settings` the library's resolved ContinuousBatchingConfig without `num_blocks`.

    Raises:
        ConfigurationError: there is no room for a cache.
    """
    try:
        cache = PagedAttentionCache(config, settings, torch.device("meta"), helper, dtype, slices_logits)
    except (MemoryError, ValueError) as exc:
        free, total = (size / (1 << 30) for size in torch.cuda.mem_get_info())
        raise ConfigurationError(
            f"no memory for the KV cache: {free:.1f} of the GPU's {total:.1f} GiB are free beside the weights, "
            f"{CACHE_SHARE:.0%} of it may be used, and a pass of LLM_BATCH_SIZE={settings.max_batch_tokens} tokens "
            "needs that; lower LLM_BATCH_SIZE, set MODEL_QUANTIZATION=nf4, or use a larger GPU (`forebay plan` "
            "computes what fits)"
        ) from exc
    return int(cache.num_blocks)


def available_memory() -> int:
    """Bytes of main memory that this process may still take: the machine's, or its cgroup's where that is less."""
    available = int(psutil.virtual_memory().available)
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            used = int(Path("/sys/fs/cgroup/memory.current").read_text())
            available = min(available, max(0, int(limit) - used))
    except (OSError, ValueError):
        pass
    return available
