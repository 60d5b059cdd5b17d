"""How much memory there is, and how large the KV cache is to be."""

from dataclasses import dataclass
from typing import Final

import torch

from forebay_contracts.sizing.gpu_memory import PAGE_TOKENS
from forebay_contracts.wire.errors import ConfigurationError
from forebay_inference.engine.machine import available_memory
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
