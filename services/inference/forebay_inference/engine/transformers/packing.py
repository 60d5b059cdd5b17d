"""Linear layers prepared for decoding on a CPU, where a pass has few tokens. The numbers stay the same.

With the weights as the checkpoint has them, oneDNN reads them at a fraction of the memory's speed. Packed once, the
same kernels take about half the time. Of a 4-bit layer, most of the time is what bitsandbytes does around its kernel.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class PackedLinear(nn.Module):  # type: ignore[misc]
    """Stands for an `nn.Linear`: same numbers, weight packed. Inference only, and on a CPU only."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        # No parameter: an opaque tensor can neither be saved nor moved.
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self._bias = None if linear.bias is None else linear.bias.detach()

    @property
    def weight(self) -> torch.Tensor:
        """[out_features, in_features], made anew: some models compute with the weights of a router themselves."""
        return self._packed.to_dense()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`hidden`: [..., in_features]; returns [..., out_features]."""
        packed: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(
            hidden, self._packed, self._bias, "none", [], ""
        )
        return packed


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this build of torch, on this CPU, has the kernels for weights of `dtype`."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return bool(dtype == torch.float32)


def pack_linears(model: Any) -> None:
    """Replace every plain linear layer of `model` by a packed one, letting go of its weight, and shorten the way to the
    kernel of every 4-bit one.

    A weight that is tied to the embedding is packed as well, which costs its size once more: the embedding is still
    read row by row.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and can_pack(child.weight.dtype):
                setattr(parent, name, PackedLinear(child))
            elif type(child).__name__ == "Linear4bit" and (forward := kernel_of_4bit(child)) is not None:
                child.forward = forward


def kernel_of_4bit(linear: Any) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """What a `bitsandbytes.nn.Linear4bit` computes, by its kernel for CPUs with AVX-512 BF16; None on other CPUs, and
    for widths that the kernel cannot compute."""
    from bitsandbytes.cextension import lib  # the embedding engine and models in bf16 do without it

    state = linear.weight.quant_state
    if state.shape[0] % 32 or state.shape[1] % state.blocksize:
        return None
    linear(torch.zeros(1, linear.in_features, dtype=torch.bfloat16))  # the first call lays the weight out anew
    weight, state = linear.weight.data, linear.weight.quant_state
    kernel = getattr(lib, f"gemv_4bit_inference_cpu_{state.quant_type}_bf16", None)
    if kernel is None or not getattr(state, "packing_format_for_cpu", False):
        return None
    absmax, bias = state.absmax, None if linear.bias is None else linear.bias.detach().to(torch.bfloat16)
    outputs, inputs, block = (ctypes.c_int64(size) for size in (*state.shape, state.blocksize))
    weight_at, absmax_at = ctypes.c_void_p(weight.data_ptr()), ctypes.c_void_p(absmax.data_ptr())

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        given = hidden.to(torch.bfloat16).contiguous()
        found = given.new_empty(*given.shape[:-1], weight.shape[0])
        rows = given.numel() // given.shape[-1]
        at = ctypes.c_void_p(given.data_ptr()), weight_at, absmax_at, ctypes.c_void_p(found.data_ptr())
        if rows:  # the kernel divides by their number
            kernel(ctypes.c_int64(rows), outputs, inputs, *at, block, inputs, outputs)
        return (found if bias is None else found.add_(bias)).to(hidden.dtype)

    return forward
