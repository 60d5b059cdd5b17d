"""The device that a model runs on, and the CPUs that it may use."""

import math
import os
from pathlib import Path

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
