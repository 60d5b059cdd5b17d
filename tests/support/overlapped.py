"""The library's batch as it runs on a GPU, on a CPU: it starts each pass before the host has the tokens of the last."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.generation.continuous_batching import input_outputs

from forebay_contracts.settings import InferenceSettings
from forebay_inference.engine.protocol import LoadedModel
from forebay_inference.engine.transformers import attention, gpu, loading
from forebay_inference.engine.transformers.engine import TransformersEngine
from support.checkpoint import write_tiny_checkpoint

UNKNOWN = -77
"""A token that is read before it was waited for."""


class Stream:
    """A stream of a device that computes at once."""

    def wait_stream(self, other: Any) -> None: ...

    def wait_event(self, event: "Event") -> None: ...

    def record_event(self, event: "Event") -> None: ...

    def synchronize(self) -> None: ...


class Event:
    """What comes with it is there once it was waited for."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.arrive: Callable[[], Any] = lambda: None

    def synchronize(self) -> None:
        self.arrive()


def _transfer(pair: Any, stream: Any) -> None:
    tokens = pair.device_io.output_ids.clone()
    pair.host_io.output_ids.fill_(UNKNOWN)
    pair.d2h_over.arrive = lambda: pair.host_io.output_ids.copy_(tokens)


def patch(patched: pytest.MonkeyPatch) -> None:
    """Make the batches that are made from now on overlap their passes."""
    settings = gpu.batch_settings
    patched.setattr(gpu, "batch_settings", lambda *a, **k: settings(*a, **k) | {"use_async_batching": True})
    # The CPU's own attention is for passes one after another.
    patched.setattr(attention, "can_attend", lambda *_: False)
    patched.setattr(torch, "Event", Event)
    patched.setattr(input_outputs, "create_device_stream", lambda device: Stream())
    patched.setattr(input_outputs.ContinuousBatchingAsyncIOs, "_supported_device_types", ("cpu",))
    make = input_outputs.HostDeviceIOPair.__init__

    def made(pair: Any, **options: Any) -> None:
        make(pair, **options)
        pair.transfer_outputs_d2h = partial(_transfer, pair)

    patched.setattr(input_outputs.HostDeviceIOPair, "__init__", made)


async def tiny_engine(folder: Path, *, two_passes: bool = False) -> tuple[TransformersEngine, LoadedModel]:
    """An engine on a tiny model, written into `folder`, in float32, so that no rounding decides between two tokens."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loading, "_dtype", lambda device: loading.torch.float32)
        # A pass of so small a model takes a tenth of the time that two threads take to wake each other on busy cores.
        patched.setattr(loading, "use_cpus", lambda device: torch.set_num_threads(1))
        if two_passes:
            patch(patched)
        settings = InferenceSettings(
            _env_file=None,
            default_model=str(write_tiny_checkpoint(folder)),
            model_quantization="none",
            model_device="cpu",
            max_concurrent_requests=4,
            llm_batch_size=64,
        )
        engine = TransformersEngine(settings)
        return engine, await engine.start(lambda line: None)
