"""Attention over the paged cache: a prompt in parts gets the numbers that it gets whole."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from forebay_inference.engine.transformers import attention, attention_variants

HEADS, KEY_HEADS, SIZE, LENGTH = 9, 3, 64, 300


def prompt() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(1, heads, LENGTH, SIZE, generator=generator).to(torch.bfloat16)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    )


PAGES = torch.randperm(16, generator=torch.Generator().manual_seed(1)) * 2 + 2
"""Pages of keys of a sequence, each before its page of values."""


def cache(sequences: int = 1) -> Any:
    """The library's allocator for one layer, whose pages hold what an earlier sequence left; none has the first two."""
    whole = torch.full((2 + 32 * sequences, attention.BLOCK, KEY_HEADS, SIZE), torch.nan, dtype=torch.bfloat16)
    whole[:2] = 0
    vectors = whole.view(-1, KEY_HEADS, SIZE)
    return SimpleNamespace(
        _kv_token_views={0: (vectors, vectors[attention.BLOCK :])},
        _copy_view=whole.view(torch.uint8).view(len(whole) // 2, -1),
        block_physical_stride=2 * attention.BLOCK,
    )


def places(first: int, end: int, pages: torch.Tensor = PAGES) -> torch.Tensor:
    """Where the library puts the positions from `first` to `end` of a sequence."""
    positions = torch.arange(first, end)
    return pages[positions // attention.BLOCK] * attention.BLOCK + positions % attention.BLOCK


def attended(allocator: Any, requests: Any, read: torch.Tensor, write: torch.Tensor, new: Any) -> torch.Tensor:
    """Queries, keys and values `new` of a pass, written and attended to."""
    kwargs = {"read_index": [read], "write_index": [write]}
    inputs = SimpleNamespace(get_model_kwargs=lambda use_padding: kwargs, requests_in_batch=requests)
    library = SimpleNamespace(cache_allocators={"full_attention": allocator})
    attention.watch_steps(SimpleNamespace(inputs_and_outputs=inputs, cache=library))
    inputs.get_model_kwargs()
    keys, values = library.update(*new[1:], 0)
    return attention._attend(SimpleNamespace(layer_idx=0), new[0], keys, values, None)[0]


def computed_in(*cuts: int) -> torch.Tensor:
    """What attention gives the prompt in passes that end at `cuts` and at its end."""
    allocator, parts = cache(), []
    for start, end in zip((0, *cuts), (*cuts, LENGTH), strict=True):
        state = SimpleNamespace(position_offset=end, generated_tokens=[])
        request = SimpleNamespace(query_length=end - start, state=state)
        read = places(0, end if start else 0)
        new = [tensor[:, :, start:end] for tensor in prompt()]
        parts.append(attended(allocator, [request], read, places(start, end), new))
    return torch.cat(parts, 1)


def test_a_prompt_at_once_is_attended_as_by_torch() -> None:
    query, key, value = prompt()
    expected = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(computed_in(), expected, rtol=0.02, atol=0.01)


@pytest.mark.parametrize("cuts", [(32,), (256,), (1,), (299,), (40, 41, 200), (17, 64, 250)])
def test_parts_make_no_difference(cuts: tuple[int, ...]) -> None:
    assert torch.equal(computed_in(*cuts), computed_in())


def test_a_decoding_sequence_gets_the_same_numbers_in_any_batch() -> None:
    query, key, value = prompt()
    lengths = (40, 150, 60, 300)  # the first and the third are padded to one length, but are not adjacent

    def decoded(*totals: int) -> torch.Tensor:
        """Each sequence has pages of its own; all tokens but its last are written before."""
        allocator = cache(len(totals))
        reads, writes, requests = [], [], []
        for number, total in enumerate(totals):
            pages = PAGES + 32 * number
            state = SimpleNamespace(position_offset=total - 1, generated_tokens=[])
            new = [tensor[:, :, : total - 1] for tensor in (query, key, value)]
            request = SimpleNamespace(query_length=total - 1, state=state)
            attended(allocator, [request], places(0, 0), places(0, total - 1, pages), new)
            state = SimpleNamespace(position_offset=total, generated_tokens=[1])
            requests.append(SimpleNamespace(query_length=1, state=state))
            reads.append(places(0, total, pages))
            writes.append(places(total - 1, total, pages))
        last = torch.tensor([total - 1 for total in totals])
        new = [tensor[:, :, last] for tensor in (query, key, value)]
        return attended(allocator, requests, torch.cat(reads), torch.cat(writes), new)

    together = decoded(*lengths)
    for row, total in enumerate(lengths):
        assert torch.equal(together[:, row : row + 1], decoded(total))
        seen = [tensor[:, :, :total] for tensor in (key, value)]
        expected = scaled_dot_product_attention(query[:, :, total - 1 : total], *seen, enable_gqa=True).transpose(1, 2)
        torch.testing.assert_close(together[:, row : row + 1], expected, rtol=0.02, atol=0.01)


def test_scores_that_would_fill_the_memory_are_computed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = (tensor.float() for tensor in prompt())
    mask = torch.full((1, 1, LENGTH, LENGTH), -torch.inf).triu_(1)
    arguments = query, key, value, mask, None, 30.0, torch.randn(HEADS)
    whole = attention_variants.attend_capped(*arguments)
    monkeypatch.setattr(attention_variants, "_SCORES_AT_ONCE", HEADS * LENGTH * 70)
    torch.testing.assert_close(attention_variants.attend_capped(*arguments), whole)
