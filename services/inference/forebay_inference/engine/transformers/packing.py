"""Linear layers with their weights in the layout that oneDNN's kernels read, for decoding on a CPU.

With the weights as the checkpoint has them, oneDNN reads them at a fraction of the memory's speed when a pass
has few tokens, as decoding does. Packed once, the same kernels give the same numbers in about half the time.
"""

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
        packed: torch.Tensor = torch.ops.mkldnn._linear_pointwise(hidden, self._packed, self._bias, "none", [], "")
        return packed


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this build of torch, on this CPU, has the kernels for weights of `dtype`."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return bool(dtype == torch.float32)


def pack_linears(model: Any) -> int:
    """Replace every plain linear layer of `model` by a packed one, letting go of its weight; returns how many.

    Layers that bitsandbytes has quantized are of other classes and stay. A weight that is tied to the embedding
    is packed as well, which costs its size once more: the embedding is still read row by row.
    """
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and can_pack(child.weight.dtype):
                setattr(parent, name, PackedLinear(child))
                count += 1
    return count
