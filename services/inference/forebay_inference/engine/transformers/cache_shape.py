"""What a model keeps of each token, found out by watching it write into a cache."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from forebay_contracts.wire.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class CacheShape:
    """`layers` of keys and values, each of `heads` vectors of `size` numbers a token, the smaller ones padded.

    `plain`: all layers write keys and values of the same shape, which are those that they attend to.
    """

    layers: int
    heads: int
    size: int
    plain: bool = True


class _Watched(DynamicCache):  # type: ignore[misc]
    """The library's cache; notes the shapes of what is written, by layer."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.written: dict[int, tuple[tuple[int, int], tuple[int, int]]] = {}

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self.written[layer_idx] = (keys.shape[1], keys.shape[3]), (values.shape[1], values.shape[3])
        return super().update(keys, values, layer_idx, *args, **kwargs)


def measure(model: Any) -> CacheShape:
    """Run one token through `model`.

    Raises:
        ConfigurationError: the model keeps something else than keys and values.
    """
    config = model.config.get_text_config()
    cache = _Watched(config)
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    try:
        with torch.inference_mode():
            model(input_ids=token, cache=cache, use_cache=True)
    except Exception as exc:  # a model with a cache of its own fails in a way of its own
        reason = " ".join(str(exc).split())[:200]
        raise ConfigurationError(f"{config.model_type} cannot run with a cache of the library: {reason}") from exc
    shapes = [shape for pair in cache.written.values() for shape in pair]
    if not shapes or max(cache.written) >= config.num_hidden_layers:
        raise ConfigurationError(f"{config.model_type} cannot be batched: it keeps no keys and values for its layers")
    heads, size = max(heads for heads, _ in shapes), max(size for _, size in shapes)
    return CacheShape(config.num_hidden_layers, heads, size, plain=len(set(shapes)) == 1)
