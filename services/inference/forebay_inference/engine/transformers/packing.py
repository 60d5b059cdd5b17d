"""Linear layers prepared for decoding on a CPU, where a pass has few tokens. The numbers stay the same.

With the weights as the checkpoint has them, oneDNN reads them at a fraction of the memory's speed. Packed once, the
same kernels take about half the time. Of a 4-bit layer, most of the time is what bitsandbytes does around its kernel.
Layers that get the same input are computed as one: two threads have a start and an end less for each, and read faster.
"""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import nn

_JOINED: Final = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of layers of one parent that get the same input, in the order in which they are called."""
_Computes = Callable[[torch.Tensor], torch.Tensor]


class PackedLinear(nn.Module):  # type: ignore[misc]
    """Stands for an `nn.Linear`, or for several whose outputs it joins: same numbers, weight packed. Inference only,
    and on a CPU only."""

    def __init__(self, *linears: nn.Linear) -> None:
        super().__init__()
        self.in_features = linears[0].in_features
        self.out_features = sum(linear.out_features for linear in linears)
        weight, bias = joined([linear.weight for linear in linears]), [linear.bias for linear in linears]
        # No parameter: an opaque tensor can neither be saved nor moved.
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        self._bias = None if bias[0] is None else joined(bias).detach()

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


class JoinedOutputs:
    """What several layers give for the last input, until the last of them is asked for it."""

    def __init__(self, compute: _Computes, sizes: Sequence[int]) -> None:
        self._compute = compute
        self._sizes = sizes
        self._last: tuple[torch.Tensor | None, Sequence[torch.Tensor]] = (None, ())

    def of(self, place: int, hidden: torch.Tensor) -> torch.Tensor:
        """The output of the layer at `place`; computes those of all for an input that is not the last one."""
        given, outputs = self._last
        if given is not hidden:
            outputs = self._compute(hidden).split(self._sizes, -1)
        self._last = (hidden, outputs) if place < len(self._sizes) - 1 else (None, ())
        return outputs[place]


class JoinedLinear(nn.Module):  # type: ignore[misc]
    """Stands for one of several linear layers that are computed as one."""

    def __init__(self, linear: Any, outputs: JoinedOutputs, place: int) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self._outputs = outputs
        self._place = place

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`hidden`: [..., in_features]; returns [..., out_features], a part of a larger tensor."""
        return self._outputs.of(self._place, hidden)


def joined(tensors: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
    """One tensor of all; no copy of a single one."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this build of torch, on this CPU, has the kernels for weights of `dtype`."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return bool(dtype == torch.float32)


def pack_linears(model: Any, *, join: bool) -> None:
    """Replace every plain linear layer of `model` by a packed one, letting go of its weight, and shorten the way to the
    kernel of every 4-bit one. `join`: compute layers that get the same input as one, which gives outputs that are not
    contiguous.

    A weight that is tied to the embedding is packed as well, which costs its size once more: the embedding is still
    read row by row.
    """
    # Not the layers themselves: each can be freed when it is replaced.
    for parent in [module for module in model.modules() if next(module.children(), None) is not None]:
        for names in _JOINED if join else ():
            linears: list[Any] = [getattr(parent, name, None) for name in names]
            alike = {
                (type(one), getattr(one, "in_features", None), getattr(one, "bias", None) is None) for one in linears
            }
            if len(alike) == 1 and (compute := _packed(*linears)) is not None:
                outputs = JoinedOutputs(compute, [linear.out_features for linear in linears])
                for place, (name, linear) in enumerate(zip(names, linears, strict=True)):
                    setattr(parent, name, JoinedLinear(linear, outputs, place))
        for name, child in list(parent.named_children()):
            if isinstance(packed := _packed(child), PackedLinear):
                setattr(parent, name, packed)
            elif packed is not None:
                child.forward = packed


def _packed(*linears: Any) -> _Computes | None:
    """What computes `linears`, of one type and width, faster."""
    if type(linears[0]) is nn.Linear and can_pack(linears[0].weight.dtype):
        return PackedLinear(*linears)
    return kernel_of_4bit(*linears) if type(linears[0]).__name__ == "Linear4bit" else None


def kernel_of_4bit(*linears: Any) -> _Computes | None:
    """What `bitsandbytes.nn.Linear4bit` of one width compute, joined, by its kernel for CPUs with AVX-512 BF16; None on
    other CPUs, and for widths that the kernel cannot compute."""
    from bitsandbytes.cextension import lib  # the embedding engine and models in bf16 do without it

    states = [linear.weight.quant_state for linear in linears]
    if any(state.shape[0] % 32 or state.shape[1] % state.blocksize for state in states):
        return None
    if len({(state.quant_type, state.blocksize) for state in states}) > 1:
        return None
    for linear in linears:  # the first call lays the weight out anew
        linear(torch.zeros(1, linear.in_features, dtype=torch.bfloat16))
    states = [linear.weight.quant_state for linear in linears]
    kernel = getattr(lib, f"gemv_4bit_inference_cpu_{states[0].quant_type}_bf16", None)
    if kernel is None or not all(getattr(state, "packing_format_for_cpu", False) for state in states):
        return None
    weight = joined([linear.weight.data for linear in linears])  # blocks of 32 outputs one after the other
    absmax = joined([state.absmax for state in states], 1)
    biases = [linear.bias for linear in linears]
    bias = None if biases[0] is None else joined(biases).detach().to(torch.bfloat16)
    sizes = weight.shape[0], states[0].shape[1], states[0].blocksize
    outputs, inputs, block = (ctypes.c_int64(size) for size in sizes)

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        given = hidden.to(torch.bfloat16).contiguous()
        found = given.new_empty(*given.shape[:-1], weight.shape[0])
        rows = given.numel() // given.shape[-1]
        at = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (given, weight, absmax, found)]
        if rows:  # the kernel divides by their number
            kernel(ctypes.c_int64(rows), outputs, inputs, *at, block, inputs, outputs)
        return (found if bias is None else found.add_(bias)).to(hidden.dtype)

    return forward
