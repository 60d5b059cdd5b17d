"""The continuous batch on a GPU: flash attention, CUDA graphs, and the memory that the library needs.

Sources: `initialization.py`, `cache.py` and `continuous_api.py` of the library's `continuous_batching`.
"""

import logging
from typing import Any, Final

import torch
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available
from transformers.utils.generic import is_flash_attention_requested

from forebay_contracts.sizing.gpu_memory import CACHE_SHARE, MAX_ROWS, PAGE_TOKENS, blocks_of
from forebay_contracts.wire.errors import ConfigurationError
from forebay_inference.engine.transformers import masked_attention
from forebay_inference.engine.transformers.cache_shape import CacheShape
from forebay_inference.engine.transformers.memory import page_tokens

_log = logging.getLogger(__name__)

_LARGEST_HEAD: Final = 256
_AMPERE: Final = (8, 0)
"""The compute capability that flash attention needs."""


def batch_settings(
    model: Any, shape: CacheShape, max_batch_tokens: int, context_length: int, *, by_sequence: bool
) -> dict[str, Any]:
    """What the library's ContinuousBatchingConfig must say for `model`, besides the number of blocks.

    `by_sequence`: the model computes sequences of one pass differently, as longrope does.
    """
    if model.device.type != "cuda":
        return {
            "page_size": page_tokens(model.device),
            "max_batch_tokens": max_batch_tokens,
            "max_requests_per_batch": min(max_batch_tokens, MAX_ROWS),
            "auto_switch_to_flash": False,
            "use_async_batching": False,
            "use_cuda_graph": False,
        }
    reason = why_no_flash(model, shape)
    if reason is not None:
        _log.warning(
            "without flash attention each pass reads the cache of all sequences under one mask, which is several times "
            "slower and takes memory: %s",
            reason,
        )
    settings = settings_on_gpu(max_batch_tokens, context_length, flash=reason is None)
    if by_sequence:
        return settings | {"use_async_batching": False, "use_cuda_graph": False}
    return settings if _can_be_recorded(model) else settings | {"use_cuda_graph": False}


def why_no_flash(model: Any, shape: CacheShape) -> str | None:
    """Why `model` cannot attend by flash attention here, or None where it can.

    The library takes flash-attn 3 or 2 that is installed, else those of the model hub by the package `kernels`.
    """
    if not shape.plain:
        return "the layers of this model keep keys and values of different sizes"
    if not model._supports_flash_attn or model._compatible_flash_implementations:
        return f"{model.config.model_type} does not support the usual kernels"
    if shape.size > _LARGEST_HEAD:
        return f"its kernels take heads of {_LARGEST_HEAD} numbers at most"
    if torch.cuda.get_device_capability(model.device) < _AMPERE:
        return "the GPU is older than Ampere"
    if is_flash_attn_3_available(kernels_fallback_ok=True) or is_flash_attn_2_available(kernels_fallback_ok=True):
        return None
    return (
        "pip install 'forebay[gpu]', which fetches it from the model hub at the first start, or flash-attn "
        "(docs/engine.md#on-a-gpu)"
    )


def has_flash(model: Any) -> bool:
    """Whether `model` attends by flash attention."""
    return bool(is_flash_attention_requested(model.config))


def watch_flash(processor: Any) -> None:
    """Answer the models that ask the cache for a length, and use it only where they are not told the positions."""
    processor.cache.get_seq_length = lambda *_: 0


def _can_be_recorded(model: Any) -> bool:
    """Whether nothing in a pass of `model` looks at the host, as experts and INT8's outliers do."""
    if any(".experts." in name for name, _ in model.named_parameters()):
        return False
    carried = getattr(model.config, "quantization_config", None)
    return carried is None or bool(getattr(carried, "load_in_4bit", False))


def affordable_blocks(manager: Any, shape: CacheShape) -> int:
    """The most blocks of cache that fit, for the library's `manager`; raises as `blocks_on_gpu`."""
    model, settings = manager.model, manager.continuous_batching_config
    with masked_attention.shaped(model.config, shape):
        config = model.config.get_text_config()
        slices = bool(model._supports_logits_to_keep())
        return blocks_on_gpu(config, settings, model.dtype, manager.distributed_helper, slices_logits=slices)


def settings_on_gpu(max_batch_tokens: int, context_length: int, *, flash: bool) -> dict[str, Any]:
    """What the library's ContinuousBatchingConfig must say on a GPU, besides the number of blocks.

    With flash attention the library prepares a pass while the one before is computed, and uses CUDA graphs. Under a
    mask both would pad and copy it.
    """
    return {
        "page_size": PAGE_TOKENS,
        "max_batch_tokens": max_batch_tokens,
        "max_requests_per_batch": min(max_batch_tokens, MAX_ROWS),
        "max_memory_percent": CACHE_SHARE,
        # Its default, 32, would take passes with a sequence of more than 8192 tokens off the fast path for decoding.
        "max_blocks_per_request": blocks_of(context_length) if flash else 0,
        "auto_switch_to_flash": flash,
        "use_async_batching": flash,
        "use_cuda_graph": flash,
    }


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
