"""The device that a model runs on, the CPUs that it may use, and numbers on their way to the device and back."""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from forebay_contracts.wire.errors import ConfigurationError


def resolve_device(name: str) -> torch.device:
    """The device that MODEL_DEVICE names: auto, cpu, cuda or cuda:N."""
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as exc:
        raise ConfigurationError(f"MODEL_DEVICE={name}: not one of auto, cpu, cuda, cuda:N") from exc
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise ConfigurationError(f"MODEL_DEVICE={name}: not one of auto, cpu, cuda, cuda:N")
    index = device.index or 0
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        raise ConfigurationError(
            f"MODEL_DEVICE={name}: this machine has {torch.cuda.device_count()} CUDA devices that torch can use"
        )
    return torch.device("cuda", index)


def use_cpus(device: torch.device) -> None:
    """Let torch compute on all CPUs that this process may use, where `device` is the CPU."""
    if device.type == "cpu":
        torch.set_num_threads(_usable_cpus())


def _usable_cpus() -> int:
    """How many CPUs this process may use: its affinity, and its cgroup's quota (which torch does not look at)."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            count = min(count, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):
        pass
    return max(1, count)


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
