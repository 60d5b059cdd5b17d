"""Linear layers prepared for decoding: the numbers are those of the layer that was given."""

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from torch import nn

from forebay_inference.engine.transformers.packing import JoinedLinear, kernel_of_4bit, pack_linears


def quantized(outputs: int, kind: str = "nf4", *, bias: bool = False) -> bitsandbytes.nn.Linear4bit:
    options = {"quant_type": kind, "compress_statistics": False}
    layer = bitsandbytes.nn.Linear4bit(576, outputs, bias=bias, compute_dtype=torch.bfloat16, **options)
    weight = torch.randn(outputs, 576).to(torch.bfloat16)
    layer.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, module=layer, **options)
    return layer.to("cpu").eval().requires_grad_(False)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_4_bit_layer_gives_the_same_bits_by_its_kernel(kind: str, bias: bool) -> None:
    torch.manual_seed(0)
    layer = quantized(192, kind, bias=bias)
    forward = kernel_of_4bit(layer)
    if not has_avx512bf16():
        assert forward is None
        return
    assert forward is not None
    for shape in ((1, 1, 576), (1, 33, 576), (7, 576)):
        for dtype in (torch.bfloat16, torch.float32):
            hidden = torch.randn(*shape).to(dtype)
            found, expected = forward(hidden), layer(hidden)
            assert torch.equal(found, expected)
            assert found.dtype == expected.dtype
    columns = torch.randn(576, 7).to(torch.bfloat16).T
    assert torch.equal(forward(columns), layer(columns.contiguous()))
    # bitsandbytes itself divides by the number of tokens there, which ends the process.
    assert forward(columns[:0]).shape == (0, 192)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bits", [16, 4])
def test_layers_computed_as_one_give_what_each_gives(bits: int, bias: bool) -> None:
    torch.manual_seed(0)
    sizes = {"q_proj": 96, "k_proj": 32, "v_proj": 32}
    if bits == 16:
        layers = {name: nn.Linear(576, size, bias=bias, dtype=torch.bfloat16) for name, size in sizes.items()}
    else:
        layers = {name: quantized(size, bias=bias) for name, size in sizes.items()}
    model = nn.ModuleDict(layers)
    first, second = torch.randn(2, 1, 5, 576).to(torch.bfloat16)
    with torch.inference_mode():
        expected = {name: (layer(first), layer(second)) for name, layer in layers.items()}
        pack_linears(model, join=True)
        assert isinstance(model["q_proj"], JoinedLinear) or (bits == 4 and not has_avx512bf16())
        # Each is right for its own input, in whatever order they are asked.
        for hidden, place in ((first, 0), (second, 1)):
            for name in sizes:
                torch.testing.assert_close(model[name](hidden), expected[name][place], rtol=0.01, atol=0.01)
        for name in reversed(sizes):
            torch.testing.assert_close(model[name](first), expected[name][0], rtol=0.01, atol=0.01)
            torch.testing.assert_close(model[name](second), expected[name][1], rtol=0.01, atol=0.01)


def test_layers_that_differ_in_width_are_not_joined() -> None:
    widths = {"gate_proj": 32, "up_proj": 64}
    model = nn.ModuleDict({name: nn.Linear(width, 32) for name, width in widths.items()})
    with torch.inference_mode():
        pack_linears(model, join=True)
    assert not any(isinstance(layer, JoinedLinear) for layer in model.values())
