"""Attention under the library's mask: on a GPU, and where `attention` cannot compute it (sliding windows, latents).

All sequences of a pass go into one attention, whose mask keeps them apart.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Final

import torch
from torch.nn.functional import pad
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from forebay_inference.engine.transformers.attention_variants import attend_capped, refuse_unknown
from forebay_inference.engine.transformers.cache_shape import CacheShape

NAME: Final = "paged|eager"
"""The library's own name: it makes masks for this one and `sdpa` alone."""


def can_attend(model: Any) -> bool:
    """Whether `model` asks a function of our choice to attend, and has not been given flash attention."""
    chosen = model.config._attn_implementation
    return bool(model._supports_attention_backend) and chosen in ("sdpa", NAME)


def install(model: Any) -> None:
    """Make `model` attend through this module, in the library's continuous batch alone."""
    AttentionInterface.register(NAME, _attend)
    model.set_attn_implementation(NAME)


@contextmanager
def shaped(config: Any, shape: CacheShape) -> Iterator[None]:
    """Within, the library makes its cache for `shape`: it would derive one from fields that mean other things in some
    models."""
    text = config.get_text_config()
    fields = (
        "layer_types",
        "sliding_window",
        "vocab_size",
        "hidden_size",
        "num_attention_heads",
        "_attn_implementation",
    )
    stand_in = SimpleNamespace(
        num_hidden_layers=shape.layers,
        num_key_value_heads=shape.heads,
        head_dim=shape.size,
        **{name: getattr(text, name, None) for name in fields},
    )
    config.__dict__["get_text_config"] = lambda: stand_in
    try:
        yield
    finally:
        del config.__dict__["get_text_config"]


def fit_cache(processor: Any, shape: CacheShape) -> None:
    """Let layers write into the cache of `processor` what is smaller than `shape`, and without the pass's arguments,
    which some models do not hand on."""
    inputs, cache = processor.inputs_and_outputs, processor.cache
    kwargs_of_pass, update = inputs.get_model_kwargs, cache.update
    latest: dict[str, Any] = {}

    def remember(use_padding: bool = False) -> Any:
        kwargs = kwargs_of_pass(use_padding=use_padding)
        latest.update(kwargs)
        return kwargs

    def padded(keys: torch.Tensor, values: torch.Tensor, layer_idx: int, kwargs: Any = None) -> Any:
        if not kwargs or "read_index" not in kwargs:
            kwargs = dict(latest)
        all_keys, all_values = update(_padded(keys, shape), _padded(values, shape), layer_idx, kwargs)
        return _like(keys, all_keys), _like(values, all_values)

    inputs.get_model_kwargs = remember
    cache.update = padded
    # Some models ask, and use it only where they are not told the positions.
    cache.get_seq_length = lambda *_: 0


def _padded(states: torch.Tensor, shape: CacheShape) -> torch.Tensor:
    _, heads, _, size = states.shape
    if (heads, size) == (shape.heads, shape.size):
        return states
    return pad(states, (0, shape.size - size, 0, 0, 0, shape.heads - heads))


def _like(states: torch.Tensor, padded: torch.Tensor) -> torch.Tensor:
    return padded[:, : states.shape[1], :, : states.shape[3]]


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    refuse_unknown(kwargs)
    if softcap is None and s_aux is None:
        attended, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, is_causal=False
        )
        return attended, None
    return attend_capped(query, key, value, attention_mask, scaling, softcap, s_aux).transpose(1, 2), None
