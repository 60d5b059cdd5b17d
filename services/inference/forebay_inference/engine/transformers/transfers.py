"""Numbers on their way to the device and back, without waiting for a GPU."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


def to_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`values` on `device`. The host does not wait for a GPU: a copy from memory that is not pinned would."""
    if device.type == "cpu":
        return torch.tensor(values, dtype=dtype)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


class Fetched:
    """Tensors on their way from the device, which the host needs later than it asks for them."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self._tensors = tensors
        self._lists: tuple[list[Any], ...] | None = None
        self._arrived: torch.cuda.Event | None = None
        if tensors[0].device.type == "cuda":
            self._tensors = tuple(torch.empty_like(one, device="cpu", pin_memory=True) for one in tensors)
            for here, there in zip(self._tensors, tensors, strict=True):
                here.copy_(there, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def lists(self) -> tuple[list[Any], ...]:
        """The numbers; waits for them."""
        if self._lists is None:
            if self._arrived is not None:
                self._arrived.synchronize()
            self._lists = tuple(one.tolist() for one in self._tensors)
        return self._lists


@contextmanager
def part(scores: torch.Tensor, rows: Sequence[int]) -> Iterator[torch.Tensor]:
    """`rows`, in order, of `scores`, shape [rows, …], to be changed in place: themselves if they are neighbours, else
    copies that are written back."""
    if rows[-1] - rows[0] == len(rows) - 1:
        yield scores[rows[0] : rows[-1] + 1]
        return
    index = to_device(rows, torch.long, scores.device)
    copied = scores[index]
    yield copied
    scores.index_copy_(0, index, copied)
