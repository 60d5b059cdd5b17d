"""How much memory there is, and how large the KV cache is to be."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil
import torch

from forebay_contracts.wire.errors import ConfigurationError
from forebay_inference.engine.transformers.cache_shape import CacheShape

# On a CPU the cache shares its memory with everything else on the machine; on a GPU it is what the memory is for.
_CPU_SHARE: Final = 0.4
_CPU_LIMIT_BYTES: Final = 1 << 30
_CUDA_SHARE: Final = 0.8


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


def plan_cache(
    shape: CacheShape, dtype: torch.dtype, device: torch.device, slots: int, context_length: int
) -> CachePlan:
    """Size the cache for `slots` sequences of `context_length` tokens, or for what the free memory holds of that.

    The context is cut where not even one sequence fits, so that a request that is accepted can always be run.

    Raises:
        ConfigurationError: not even a short sequence fits.
    """
    page_size = 32 if device.type == "cpu" else 256
    per_block = bytes_per_token(shape, dtype) * page_size
    wanted = slots * -(-context_length // page_size)
    budget = cache_budget(device)
    # The library keeps two blocks of its own besides.
    affordable = budget // per_block - 2
    blocks = min(wanted, affordable)
    if blocks < 1:
        raise ConfigurationError(
            f"no memory for the KV cache on {device}: {budget >> 20} MiB may be used for it, "
            f"and {page_size} tokens take {per_block >> 10} KiB"
        )
    return CachePlan(blocks, page_size, min(context_length, blocks * page_size))


def bytes_per_token(shape: CacheShape, dtype: torch.dtype) -> int:
    """Bytes that the keys and values of one token take over all layers."""
    return 2 * shape.layers * shape.heads * shape.size * int(dtype.itemsize)


def cache_budget(device: torch.device) -> int:
    """Bytes that the KV cache may take on `device`, the weights being loaded already."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * _CUDA_SHARE)
    return min(_CPU_LIMIT_BYTES, int(available_memory() * _CPU_SHARE))


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
