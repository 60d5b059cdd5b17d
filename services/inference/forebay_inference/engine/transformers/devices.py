"""The device that a model runs on, and the CPUs that it may use."""

import os

import torch

from forebay_contracts.wire.errors import ConfigurationError
from forebay_inference.engine.machine import usable_cpus


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
    """Let torch compute on all CPUs that this process may use, where `device` is the CPU, and compile nothing there."""
    if device.type == "cpu":
        torch.set_num_threads(usable_cpus())
        # bitsandbytes decorates with torch.compile what runs on no CPU here; the compiler's imports take 0.7 s.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
