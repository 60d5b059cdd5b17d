"""Attention over the paged cache: a prompt in parts gets the numbers that it gets whole."""

from types import SimpleNamespace

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


def computed_in(*cuts: int) -> torch.Tensor:
    """What attention gives the prompt in passes that end at `cuts` and at its end."""
    query, key, value = prompt()
    places = torch.randperm(LENGTH, generator=torch.Generator().manual_seed(1))
    caches = (torch.zeros(LENGTH, KEY_HEADS, SIZE).bfloat16(), torch.zeros(LENGTH, KEY_HEADS, SIZE).bfloat16())
    parts = []
    for start, end in zip((0, *cuts), (*cuts, LENGTH), strict=True):
        for cache, new in zip(caches, (key, value), strict=True):
            cache.index_copy_(0, places[start:end], new[0, :, start:end].transpose(0, 1))
        request = SimpleNamespace(
            query_length=end - start, state=SimpleNamespace(position_offset=end, generated_tokens=[])
        )
        read = places[:end] if start else places[:0]
        step = attention._plan([request], {"read_index": [read], "write_index": [places[start:end]]}, [caches])
        new = [tensor[:, :, start:end] for tensor in (query, key, value)]
        attention._pass.step, attention._pass.written = step, new[1:]
        parts.append(attention._attend(SimpleNamespace(layer_idx=0), *new, None)[0])
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
    caches = (key[0].transpose(0, 1).contiguous(), value[0].transpose(0, 1).contiguous())
    lengths = (40, 150, 60, 300)  # the first and the third are padded to one length, but are not adjacent

    def attended(*totals: int) -> torch.Tensor:
        states = [SimpleNamespace(position_offset=total, generated_tokens=[1]) for total in totals]
        requests = [SimpleNamespace(query_length=1, state=state) for state in states]
        read = torch.cat([torch.arange(total) for total in totals])
        last = torch.tensor([total - 1 for total in totals])
        new = [tensor[:, :, last] for tensor in (query, key, value)]
        attention._pass.step = attention._plan(requests, {"read_index": [read], "write_index": [last]}, [caches])
        attention._pass.written = new[1:]
        return attention._attend(SimpleNamespace(layer_idx=0), *new, None)[0]

    together = attended(*lengths)
    for row, total in enumerate(lengths):
        assert torch.equal(together[:, row : row + 1], attended(total))
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
