"""`python -m forebay_inference`: a worker in the foreground, until SIGTERM or SIGINT."""

import asyncio
import os
import signal
import socket
import sys
import uuid
from typing import Final

import uvloop

from forebay_contracts import extras
from forebay_contracts.nats import clock
from forebay_contracts.nats.connection import Connection, connected
from forebay_contracts.nats.presence import Presence
from forebay_contracts.process import collect_seldom, raise_file_limit
from forebay_contracts.queueing.admission import JetStreamAdmission
from forebay_contracts.queueing.answer_log import JetStreamAnswerLog
from forebay_contracts.queueing.deliveries import JetStreamDeliveries
from forebay_contracts.queueing.failed import FailedRequests
from forebay_contracts.queueing.logged_reply import LoggedReplyChannel
from forebay_contracts.queueing.protocols import ReplyChannel
from forebay_contracts.queueing.reply_channel import LiveReplyChannel
from forebay_contracts.queueing.room import JetStreamPrecedence
from forebay_contracts.queueing.state_store import KeyValueStateStore
from forebay_contracts.settings import InferenceSettings, load
from forebay_contracts.telemetry import logs, metrics, tracing
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import ConfigurationError, ForebayError
from forebay_contracts.wire.heartbeats import ApiInfo
from forebay_inference.attempt.giving_way import GivingWay
from forebay_inference.attempt.runner import AttemptRunner
from forebay_inference.engine.model import Model
from forebay_inference.engine.simulated import SimulatedEngine
from forebay_inference.engine.text.model import TextModel
from forebay_inference.exposition import serve as expose
from forebay_inference.handover import Handover
from forebay_inference.idle import IdleSlots
from forebay_inference.worker import Worker
from forebay_inference.worker_metrics import WorkerMetrics

FILES_PER_SLOT: Final = 128
"""A request may have 128 choices, and each may be a connection to an inference server."""

SPARE_FILES: Final = 256


def build_model(settings: InferenceSettings) -> Model:
    """The model that a worker serves, on the engine that INFERENCE_ENGINE names."""
    extras.require(settings.inference_engine)
    # Imported here, since they take seconds, and each needs libraries that others do without.
    match settings.inference_engine:
        case "simulated":
            return TextModel(SimulatedEngine(settings.model_adapters))
        case "embedding" if settings.model_task == "rerank":
            from forebay_inference.engine.embedding.reranker import CrossEncoderEngine

            return TextModel(CrossEncoderEngine(settings))
        case "embedding":
            from forebay_inference.engine.embedding.engine import EmbeddingEngine

            return TextModel(EmbeddingEngine(settings))
        case "transformers":
            from forebay_inference.engine.transformers.engine import TransformersEngine

            return TextModel(TransformersEngine(settings), closed_schemas=settings.closed_schemas)
        case served:
            return _served_model(settings, served)


def _served_model(settings: InferenceSettings, engine: str) -> Model:
    """A model in an inference server beside the worker."""
    if engine == "openai":
        from forebay_inference.engine.openai import OpenAIModel

        return OpenAIModel(settings)
    if (task := settings.model_task) in ("embed", "rerank"):
        from forebay_inference.engine.served.embedder import ServedEmbedder
        from forebay_inference.engine.served.pooling import POOLING
        from forebay_inference.engine.served.reranker import ServedReranker

        made = ServedEmbedder if task == "embed" else ServedReranker
        return TextModel(made(settings, POOLING[engine](task)))
    from forebay_inference.engine.served.dialects import DIALECTS
    from forebay_inference.engine.served.engine import ServedEngine

    return TextModel(ServedEngine(settings, DIALECTS[engine]()), closed_schemas=settings.closed_schemas)


def build_worker(settings: InferenceSettings, connection: Connection) -> Worker:
    """A worker on NATS."""
    worker_id = f"{socket.gethostname().split('.')[0]}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
    model = build_model(settings)
    if settings.model_adapters and not model.adapters:
        raise ConfigurationError(f"MODEL_ADAPTERS: INFERENCE_ENGINE={settings.inference_engine} has no LoRA adapters")
    apis = Presence(connection, names.APIS_BUCKET, ApiInfo, asked=names.connected_subject)

    answers = JetStreamAnswerLog(connection)
    precedence = JetStreamPrecedence(connection, settings.served_model)

    def channel(reply_to: str, deadline: float) -> ReplyChannel:
        if names.is_logged(reply_to):
            return LoggedReplyChannel(answers, names.id_of(reply_to), deadline)
        return LiveReplyChannel(connection, reply_to, deadline, lambda: apis.is_alive(names.api_of(reply_to)))

    deliveries = JetStreamDeliveries(connection, settings.served_model)
    handover = Handover(connection, deliveries, settings.served_model, worker_id)
    runner = AttemptRunner(
        worker=worker_id,
        states=KeyValueStateStore(connection),
        engine=model,
        channel=channel,
        api_alive=lambda api: not api or apis.is_alive(api),
        connected_for_s=lambda: connection.age_s,
        max_deliveries=settings.max_deliveries,
        metrics=WorkerMetrics(settings.served_model),
        put_back=JetStreamAdmission(connection).put_back,
        giving_way=GivingWay(precedence),
        keep=FailedRequests(connection).keep,
        taken=handover.taken,
    )
    idle = IdleSlots(precedence.say_idle)
    return Worker(worker_id, settings, connection, model, deliveries, runner, apis, idle, handover)


async def serve(settings: InferenceSettings) -> None:
    """Connect, work, drain."""
    raise_file_limit(settings.slots * FILES_PER_SLOT + SPARE_FILES)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for ending in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(ending, stop.set)
    connecting = connected(settings, "forebay-inference", "inference")
    async with connecting as connection, clock.followed(connection.requests):
        worker = build_worker(settings, connection)
        expose(settings, worker.health)
        await worker.run(stop)


def main() -> int:
    """Work; the exit status."""
    collect_seldom()  # before the imports of the engine
    try:
        settings = load(InferenceSettings)
        logs.configure(settings)
        metrics.configure(settings)
        tracing.configure("forebay-inference")
        uvloop.run(serve(settings))
    except ForebayError as exc:
        logs.write_out()
        print(f"forebay inference: {exc}", file=sys.stderr)
        return 2 if isinstance(exc, ConfigurationError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
