"""What attention functions are asked for besides softmax(q k) v: computed here, or refused.

A model hands its attention function more arguments than queries, keys and values, and an attention function that does
not know one of them computes something else without a word.
"""

from collections.abc import Mapping
from typing import Any, Final

import torch
from transformers.generation.continuous_batching.input_outputs import PagedAttentionArgs

from forebay_inference.engine.protocol import EngineFault

_KNOWN: Final = frozenset(PagedAttentionArgs.__annotations__) | {
    "dropout",  # 0 outside of training
    "sliding_window",  # in the mask, and in what the cache keeps
    "logits_to_keep",
}
"""Arguments that change nothing, or that the library's cache and mask obey already."""

_SCORES_AT_ONCE: Final = 1 << 26
"""Scores in memory at once, 256 MiB in float32: on a GPU a pass may ask for a thousand times as many."""


def refuse_unknown(arguments: Mapping[str, Any]) -> None:
    """Raise EngineFault where `arguments` hold one, not None, that no attention function here obeys."""
    for name in arguments.keys() - _KNOWN:
        if arguments[name] is not None and arguments[name] is not False:
            raise EngineFault(f"the model's attention needs {name}, which this engine does not compute")


def attend_capped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scaling: float | None,
    cap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention with scores bounded softly by `cap`, and with a sink in each head's softmax.

    `query`: [sequences, heads, queries, size]; `key`, `value`: [sequences, key heads, keys, size]; `mask` is added to
    the scores; `sinks`: [heads]. Returns [sequences, heads, queries, size of a value].
    """
    sequences, heads, queries, _ = query.shape
    at_once = max(1, _SCORES_AT_ONCE // (sequences * heads * key.shape[2]))
    if queries > at_once:
        parts = [slice(first, first + at_once) for first in range(0, queries, at_once)]
        rest = key, value
        return torch.cat(
            [attend_capped(query[:, :, at], *rest, mask[..., at, :], scaling, cap, sinks) for at in parts], dim=2
        )
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    groups = query.shape[1] // key.shape[1]
    scores = (query @ key.repeat_interleave(groups, 1).transpose(2, 3)).mul_(scaling)
    if cap is not None:
        scores.div_(cap).tanh_().mul_(cap)
    scores += mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)[..., : key.shape[2]]
    return weights @ value.repeat_interleave(groups, 1)
