"""Attention over the paged cache on a CPU, sequence by sequence, for models whose layers all see the whole sequence.

The library's own CPU path puts all sequences of a step into one attention with a block-diagonal mask, so that
each token is scored against every other sequence's keys and eight sequences cost eight times too much. Here
decoding sequences of similar length are padded to a batch, and each prefill is an attention of its own,
block by block.
"""

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.generation.continuous_batching.cache import group_layers_by_attn_type

from forebay_inference.engine.protocol import EngineFault
from forebay_inference.engine.transformers.attention_variants import attend_capped, refuse_unknown
from forebay_inference.engine.transformers.cache_shape import CacheShape

NAME: Final = "forebay_paged_cpu"
BLOCK: Final = 32
"""Positions of a prompt whose attention is computed at once; the cache's page size on a CPU."""
_pass: Final = threading.local()
"""Of each generation thread, the `step` that it computes. Not an argument: some models do not pass theirs on."""


@dataclass(frozen=True, slots=True)
class _Decoding:
    """Sequences with one new token each. `rows`: their places in the pass, a slice where they are adjacent; `units` of
    their keys and values; `mask`: [sequences, 1, 1, length], added to the scores."""

    rows: slice | torch.Tensor
    units: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Block:
    """A block of BLOCK positions of a prompt. `rows` of the pass hold those from position `before` of the block on.

    `mask`: [BLOCK, keys up to the end of the block], added to the scores."""

    rows: slice
    before: int
    mask: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Prefill:
    """New positions of one prompt. `units` of the keys and values of all its positions, padded to whole blocks."""

    units: torch.Tensor
    blocks: Sequence[_Block]


@dataclass(frozen=True, slots=True)
class _Step:
    """What every layer needs to know of one pass. `views`: for each layer its keys and values in the cache, each
    [places, key heads, head size]; `write`: the new keys' and values' vectors of the cache.

    The cache is the library's, a page of keys before one of values. Here a page holds its heads one after the other,
    each a unit of BLOCK vectors: so the keys of a sequence's head are read as one matrix."""

    views: Any
    write: torch.Tensor
    decoding: Sequence[_Decoding]
    prefills: Sequence[_Prefill]


def can_attend(model: Any, shape: CacheShape) -> bool:
    """Whether this attention can compute `model`, which writes keys and values of `shape` into its cache."""
    kinds = group_layers_by_attn_type(model.config.get_text_config())
    asks = bool(model._supports_attention_backend)
    return asks and model.device.type == "cpu" and shape.plain and set(kinds) == {"full_attention"}


def install(model: Any) -> None:
    """Make `model` attend through this module; passes that `watch_steps` did not prepare then fail."""
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, lambda *_, **__: None)
    model.set_attn_implementation(NAME)


def watch_steps(processor: Any) -> None:
    """Have the library's batch processor hand each pass's plan to the layers, and leave the cache's reads to them."""
    inputs, cache = processor.inputs_and_outputs, processor.cache
    allocator = next(iter(cache.cache_allocators.values()))
    blocks, kwargs_of_step = allocator._copy_view, inputs.get_model_kwargs

    def with_plan(use_padding: bool = False) -> Any:
        kwargs = kwargs_of_step(use_padding=use_padding)
        # A page is read whole, and zeros do not spoil what is masked, as a NaN of an earlier sequence would.
        write = kwargs["write_index"][0]
        blocks.index_fill_(0, write[write % BLOCK == 0] // allocator.block_physical_stride, 0)
        _pass.step = _plan(inputs.requests_in_batch, kwargs, allocator._kv_token_views)
        return kwargs

    def write_only(
        keys: torch.Tensor, values: torch.Tensor, layer_idx: int, kwargs: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        step: _Step = _pass.step
        size = keys.shape[3]
        vectors = step.views[layer_idx][0].view(-1, size)
        vectors.index_copy_(0, step.write, torch.cat((keys, values), 1).reshape(-1, size))
        _pass.written = keys, values
        return keys, values

    inputs.get_model_kwargs = with_plan
    cache.update = write_only
    cache.get_seq_length = lambda *_: 0


def _plan(requests: Sequence[Any], kwargs: Any, views: Any) -> _Step:
    read, write = kwargs["read_index"][0], kwargs["write_index"][0]
    heads = next(iter(views.values()))[0].shape[1]
    decoding: dict[int, list[tuple[int, torch.Tensor]]] = {}
    prefills: list[_Prefill] = []
    row = place = 0
    for request in requests:
        new, total = request.query_length, request.state.position_offset
        keys = read[place : place + total] if read.numel() else None
        place += total
        if keys is not None and request.state.generated_tokens:
            decoding.setdefault(padded_length(total), []).append((row, keys))
        else:
            prefills.append(_prefill(row, new, write[row : row + new] if keys is None else keys, heads))
        row += new
    groups = [_padded(group, length, heads) for length, group in decoding.items()]
    vectors = _units(write // BLOCK, heads) * BLOCK + write % BLOCK
    return _Step(views, vectors.view(-1), groups, prefills)


def _units(pages: torch.Tensor, heads: int) -> torch.Tensor:
    """[2, ..., heads, pages] of `pages` of keys, [..., pages]: the units of the keys and of the values."""
    of_both = torch.stack((pages, pages + 1)) * heads
    return of_both.unsqueeze(-2) + torch.arange(heads).unsqueeze(1)


def _prefill(row: int, new: int, keys: torch.Tensor, heads: int) -> _Prefill:
    """The last `new` positions of `keys`, whose first is at `row` of the pass.

    The kernel's rounding depends on its shapes. Here they depend on the position alone, so that a prompt gets the same
    numbers to the bit in whatever parts it is computed: at once, over several passes, or after a cached prefix.
    """
    total = keys.numel()
    past = total - new
    blocks = []
    for first in range(past - past % BLOCK, total, BLOCK):
        start, end = max(first, past), min(first + BLOCK, total)
        mask = torch.full((BLOCK, first + BLOCK), -math.inf, dtype=torch.bfloat16).triu_(first + 1)
        blocks.append(_Block(slice(row + start - past, row + end - past), start - first, mask))
    return _Prefill(_units(keys[::BLOCK] // BLOCK, heads), blocks)


def padded_length(tokens: int) -> int:
    """The length that a decoding sequence of `tokens` is padded to: the next of 64, 96, 128, 192, 256, 384, …

    It depends on the sequence alone, since the kernel's rounding depends on it: whatever else is in the batch,
    a sequence gets the same numbers to the bit. Few different lengths make few groups.
    """
    length = 64
    while length < tokens:
        length += length // 2 if length.bit_count() == 1 else length // 3
    return length


def _padded(group: Sequence[tuple[int, torch.Tensor]], length: int, heads: int) -> _Decoding:
    pages = torch.zeros(len(group), length // BLOCK, dtype=torch.int64)
    mask = torch.zeros(len(group), 1, 1, length, dtype=torch.bfloat16)
    for index, (_, keys) in enumerate(group):
        first = keys[::BLOCK]
        pages[index, : first.numel()] = first // BLOCK
        mask[index, ..., keys.numel() :] = -math.inf
    rows = [row for row, _ in group]
    adjacent = rows[-1] - rows[0] == len(rows) - 1
    return _Decoding(slice(rows[0], rows[-1] + 1) if adjacent else torch.tensor(rows), _units(pages, heads), mask)


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
    """`query`: [1, heads, new tokens, size], `key` and `value`: [1, key heads, new tokens, size], all in the
    cache already; returns [1, new tokens, heads, size]."""
    refuse_unknown(kwargs)
    written = _pass.written
    if attention_mask is not None or key is not written[0] or value is not written[1]:
        raise EngineFault("the model attends to something else than the keys and values in its cache")
    step: _Step = _pass.step
    heads, new, size = query.shape[1:]
    key_heads = key.shape[1]
    units = step.views[module.layer_idx][0].view(-1, BLOCK * size)
    out = query.new_empty(1, new, heads, size)
    by_token = query[0].transpose(0, 1)
    for group in step.decoding:
        count, length = len(group.mask), group.mask.shape[3]
        keys, values = units.index_select(0, group.units.view(-1)).view(2, count, key_heads, length, size)
        # The heads that share a key head are its queries: no copy of the keys for each of them.
        queries = by_token[group.rows].reshape(count, key_heads, heads // key_heads, size)
        mask = group.mask.to(query.dtype)
        if softcap is None and s_aux is None:
            attended = scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scaling)
        else:
            queries = queries.view(count, heads, 1, size)
            attended = attend_capped(queries, keys, values, mask, scaling, softcap, s_aux)
        out[0, group.rows] = attended.reshape(count, heads, size)
    for prefill in step.prefills:
        keys, values = units.index_select(0, prefill.units.view(-1)).view(2, 1, key_heads, -1, size)
        for block in prefill.blocks:
            queries = query[:, :, block.rows]
            count, length = queries.shape[2], block.mask.shape[1]
            queries = pad(queries, (0, 0, block.before, BLOCK - block.before - count))
            seen = keys[:, :, :length], values[:, :, :length]
            mask = block.mask.to(query.dtype)
            if softcap is None and s_aux is None:
                attended = scaled_dot_product_attention(
                    queries, *seen, attn_mask=mask, scale=scaling, enable_gqa=key_heads != heads
                )
            else:
                attended = attend_capped(queries, *seen, mask, scaling, softcap, s_aux)
            out[:, block.rows] = attended[:, :, block.before : block.before + count].transpose(1, 2)
    return out, None
