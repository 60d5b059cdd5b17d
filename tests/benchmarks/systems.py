"""The systems that are compared, each ready to be loaded at a port: Forebay and its peers."""

import asyncio
import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common import HERE, MODEL, ROOT, Background, Unavailable, cpu_s, free_port, peer_python
from forebay_contracts.settings import InferenceSettings
from forebay_inference.engine.served.dialects import DIALECTS
from forebay_inference.engine.served.process import filled
from forebay_inference.models.store import ensure_gguf, ensure_model
from support.nats import NatsServer
from support.stack import Stack, data_dir, running

PEERS = HERE / "peers"
VLLM = ROOT / "build" / "vllm" / "bin" / "python"
"""Of `make test-vllm`."""


@dataclass
class System:
    """Something that serves chat completions; `processes` by what they are called."""

    name: str
    port: int
    processes: dict[str, list[psutil.Process]]
    streams: bool = True
    background: list[Background] = field(default_factory=list)

    def cpu(self) -> dict[str, float]:
        """CPU seconds of each process so far."""
        return {name: cpu_s(processes) for name, processes in self.processes.items()}

    def hold(self) -> None:
        """Stop what may be stopped while others have their turn."""
        for one in self.background:
            one.hold()

    def go_on(self) -> None:
        """Let it run again."""
        for one in self.background:
            one.go_on()


@contextlib.asynccontextmanager
async def forebay(**settings: Any) -> AsyncIterator[tuple[System, Stack, NatsServer]]:
    """Forebay as processes, on the simulated engine unless `settings` say otherwise."""
    with nats_server() as nats:
        async with running(nats, **settings) as stack:
            yield as_system(stack, nats), stack, nats


async def default_model() -> Path:
    """The folder of the default model, fetched first where it is not there."""
    name = InferenceSettings(_env_file=None).default_model
    return await asyncio.to_thread(ensure_model, name, data_dir(), lambda line: None)


@contextlib.asynccontextmanager
async def real_model(quantization: str, slots: int) -> AsyncIterator[Stack]:
    """Forebay with one worker that has the default model; ask it for `served_model`."""
    await default_model()
    settings = {
        "inference_engine": "transformers",
        "model_quantization": quantization,
        "max_concurrent_requests": slots,
        "request_timeout": 300,
        "data_dir": data_dir(),
    }
    with nats_server() as nats:
        async with running(nats, **settings) as stack:
            yield stack


def inference_server(engine: str, slots: int) -> tuple[Background, int, str]:
    """The server of an engine as a worker would start it, not started yet; its port, and what it calls the model."""
    python = os.environ.get("VLLM_PYTHON", str(VLLM)) if engine == "vllm" else sys.executable
    if not Path(python).exists():
        raise Unavailable(f"{python} is missing: `make test-vllm` installs vLLM")
    settings = InferenceSettings(
        _env_file=None, inference_engine=engine, data_dir=data_dir(), max_concurrent_requests=slots
    )
    dialect = DIALECTS[engine]()
    ensure = ensure_gguf if dialect.weights == "gguf" else ensure_model
    model = ensure(settings.default_model, settings.data_dir, lambda line: None)
    port, name = free_port(), settings.served_model
    values = {"python": python, "model": model, "name": name, "port": port, "slots": slots}
    env = {"PYTHONPATH": ""} if engine == "vllm" else {}
    return Background(engine, filled(dialect.command(settings), values), env), port, name


def as_system(stack: Stack, nats: NatsServer) -> System:
    """A running stack to be loaded at its first api."""
    return System(
        "forebay",
        stack.apis[0].port,
        {
            "nats-server": [psutil.Process(nats.pid)],
            "api": [psutil.Process(api.pid) for api in stack.apis],
            "worker": [psutil.Process(worker.pid) for worker in stack.workers],
        },
    )


@contextlib.contextmanager
def nats_server(*options: str) -> Iterator[NatsServer]:
    """A server of its own, with a store that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="forebay-bench-") as folder:
        nats = NatsServer(Path(folder) / "nats", *options)
        nats.start()
        try:
            yield nats
        finally:
            nats.stop()


@contextlib.contextmanager
def redis_server() -> Iterator[tuple[str, Background]]:
    """A Redis of its own that appends to its file once a second, its URL first."""
    binary = shutil.which("redis-server")
    if binary is None:
        raise Unavailable("redis-server is missing (Debian: apt-get install redis-server)")
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="forebay-bench-") as folder:
        options = ("--bind", "127.0.0.1", "--port", str(port), "--dir", folder, "--appendonly", "yes", "--save", "")
        with Background("redis-server", [binary, *options]) as server:
            server.wait_for_port(port)
            yield f"redis://127.0.0.1:{port}/0", server


@contextlib.contextmanager
def bare() -> Iterator[System]:
    """The engine behind HTTP in one process."""
    with _http("bare HTTP", sys.executable, "bare") as (server, port):
        yield System("bare HTTP", port, {"http": [server.process]}, background=[server])


@contextlib.contextmanager
def core_nats() -> Iterator[System]:
    """Core NATS request and reply."""
    with contextlib.ExitStack() as stack:
        nats = stack.enter_context(nats_server())
        command = [sys.executable, "-m", "benchmarks.peers.core_nats", "0", nats.url, "worker"]
        worker = stack.enter_context(Background("the core NATS worker", command))
        server, port = stack.enter_context(_http("core NATS", sys.executable, "core_nats", nats.url))
        processes = {"http": [server.process], "worker": [worker.process], "nats-server": [psutil.Process(nats.pid)]}
        yield System("core NATS", port, processes, background=[server, worker])


@contextlib.contextmanager
def litellm() -> Iterator[System]:
    """LiteLLM's proxy, without a database, before the bare engine; one process each."""
    python = peer_python("litellm")
    with contextlib.ExitStack() as stack:
        engine, engine_port = stack.enter_context(_http("the engine of LiteLLM", sys.executable, "bare"))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="forebay-bench-")))
        (folder / "config.yaml").write_text(
            f"model_list:\n  - model_name: {MODEL}\n    litellm_params:\n      model: openai/{MODEL}\n"
            f"      api_base: http://127.0.0.1:{engine_port}/v1\n      api_key: none\n"
            "litellm_settings:\n  telemetry: false\n  drop_params: true\n"
        )
        port = free_port()
        command = [str(Path(python).parent / "litellm"), "--config", str(folder / "config.yaml")]
        options = ["--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"]
        # No key: its check would only cost it time.
        quiet = {
            "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
            "LITELLM_LOG": "ERROR",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "NO_DOCS": "True",
            "PYTHONPATH": "",
        }
        proxy = stack.enter_context(Background("LiteLLM", command + options, quiet))
        proxy.wait_for_port(port)
        yield System(
            "LiteLLM", port, {"proxy": [proxy.process], "engine": [engine.process]}, background=[proxy, engine]
        )


@contextlib.contextmanager
def taskiq(broker: str) -> Iterator[System]:
    """Taskiq, `broker` being nats or redis; one worker process, as many tasks at once as come."""
    python = peer_python("queues")
    with contextlib.ExitStack() as stack:
        if broker == "nats":
            nats = stack.enter_context(nats_server())
            url, store = nats.url, psutil.Process(nats.pid)
        else:
            url, redis = stack.enter_context(redis_server())
            store = redis.process
        env = {"BENCH_BROKER": url}
        options = ["--workers", "1", "--max-async-tasks", "256", "--log-level", "ERROR"]
        command = [python, "-m", "taskiq", "worker", "benchmarks.peers.taskiq_app:broker", *options]
        worker = stack.enter_context(Background("the taskiq worker", command, env))
        server, port = stack.enter_context(_http(f"taskiq ({broker})", python, "taskiq_app", env=env))
        processes = {"http": [server.process], "worker": [worker.process], broker: [store]}
        # Not to be stopped: a worker whose blocking read of Redis was, gets nothing any more. Idle, it costs little.
        yield System(f"taskiq, {_BROKERS[broker]}", port, processes, streams=False)


_BROKERS = {"nats": "NATS", "redis": "Redis"}


@contextlib.contextmanager
def celery() -> Iterator[System]:
    """Celery on Redis, two worker processes."""
    python = peer_python("queues")
    with contextlib.ExitStack() as stack:
        url, redis = stack.enter_context(redis_server())
        env = {"BENCH_BROKER": url}
        options = ["-c", "2", "-l", "ERROR", "--without-gossip", "--without-mingle", "--without-heartbeat"]
        command = [python, "-m", "celery", "-A", "benchmarks.peers.celery_app", "worker", *options]
        worker = stack.enter_context(Background("the Celery worker", command, env))
        server, port = stack.enter_context(_http("Celery", python, "celery_app", env=env))
        processes = {"http": [server.process], "worker": [worker.process], "redis": [redis.process]}
        yield System("Celery, Redis", port, processes, streams=False, background=[server, worker])


@contextlib.contextmanager
def _http(
    name: str, python: str, module: str, *arguments: str, env: dict[str, str] | None = None
) -> Iterator[tuple[Background, int]]:
    port = free_port()
    command: Sequence[str] = [python, "-m", f"benchmarks.peers.{module}", str(port), *arguments]
    with Background(name, command, env) as server:
        server.wait_for_port(port)
        yield server, port


ALL = {
    "bare HTTP": bare,
    "core NATS": core_nats,
    "LiteLLM": litellm,
    "taskiq, NATS": lambda: taskiq("nats"),
    "taskiq, Redis": lambda: taskiq("redis"),
    "Celery, Redis": celery,
}
"""How each peer is started."""
