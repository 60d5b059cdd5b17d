"""`python -m forebay_inference`: a worker in the foreground, until SIGTERM or SIGINT."""

import asyncio
import logging
import signal
import sys

import uvloop

from forebay_contracts.nats.connection import connected
from forebay_contracts.settings import InferenceSettings, load
from forebay_contracts.telemetry import logs, metrics, tracing
from forebay_contracts.wire.errors import ConfigurationError, ForebayError
from forebay_inference.engine.protocol import Engine
from forebay_inference.engine.simulated import SimulatedEngine
from forebay_inference.exposition import serve as expose
from forebay_inference.worker import Worker


def build_engine(settings: InferenceSettings) -> Engine:
    """The engine that INFERENCE_ENGINE names."""
    if settings.inference_engine == "simulated":
        return SimulatedEngine(settings.served_model)
    if settings.inference_engine == "embedding":
        from forebay_inference.engine.embedding.engine import EmbeddingEngine

        return EmbeddingEngine.from_settings(settings)
    # Imported here, since it takes seconds and a simulated worker needs no torch.
    from forebay_inference.engine.transformers import TransformersEngine

    return TransformersEngine.from_settings(settings)


async def serve(settings: InferenceSettings) -> None:
    """Connect, work, drain."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for ending in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(ending, stop.set)
    async with connected(settings, "forebay-inference", "inference") as connection:
        worker = Worker(settings, connection, build_engine(settings))
        expose(settings, worker.health)
        await worker.run(stop)


def main() -> int:
    """Work; the exit status."""
    try:
        settings = load(InferenceSettings)
        logs.configure(settings)
        metrics.configure(settings)
        tracing.configure("forebay-inference")
        uvloop.run(serve(settings))
    except ForebayError as exc:
        logging.shutdown()  # what it said before comes before
        print(f"forebay inference: {exc}", file=sys.stderr)
        return 2 if isinstance(exc, ConfigurationError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
