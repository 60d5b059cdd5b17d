"""Linear layers prepared for decoding: the numbers are those of the layer that was given."""

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import has_avx512bf16

from forebay_inference.engine.transformers.packing import kernel_of_4bit


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_4_bit_layer_gives_the_same_bits_by_its_kernel(kind: str, bias: bool) -> None:
    torch.manual_seed(0)
    options = {"quant_type": kind, "compress_statistics": False}
    layer = bitsandbytes.nn.Linear4bit(576, 192, bias=bias, compute_dtype=torch.bfloat16, **options)
    weight = torch.randn(192, 576).to(torch.bfloat16)
    layer.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, module=layer, **options)
    layer = layer.to("cpu").eval().requires_grad_(False)
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
