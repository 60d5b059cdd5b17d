"""Inference servers beside the worker: llama.cpp with a tiny model, on one thread."""

import sys
from pathlib import Path
from typing import Any

from forebay_contracts.settings import InferenceSettings
from forebay_inference.engine.served.embedder import ServedEmbedder
from forebay_inference.engine.served.engine import ServedEngine
from forebay_inference.engine.served.llamacpp import LlamaCpp
from forebay_inference.engine.served.pooling import LlamaCppPooling
from forebay_inference.engine.served.reranker import ServedReranker

# Threads of llama.cpp wait for each other without yielding: beside other work, two take many times as long as one.
SERVER = f"{sys.executable} -m forebay_inference.engine.served.llama_server {{model}} --port={{port}} --threads=1"


def llama_cpp_engine(model: Path, *, slots: int = 4, **settings: Any) -> ServedEngine:
    """An engine that has not started, with `slots` slots of llama.cpp."""
    return ServedEngine(_settings(model, slots, "", settings), LlamaCpp())


def llama_cpp_reranker(model: Path, *, slots: int = 4, **settings: Any) -> ServedReranker:
    """The same for scores."""
    return ServedReranker(_settings(model, slots, " --reranking", settings), LlamaCppPooling("rerank"))


def llama_cpp_embedder(model: Path, *, slots: int = 4, **settings: Any) -> ServedEmbedder:
    """The same for vectors."""
    return ServedEmbedder(_settings(model, slots, " --embedding", settings), LlamaCppPooling("embed"))


def _settings(model: Path, slots: int, options: str, settings: dict[str, Any]) -> InferenceSettings:
    command = f"{SERVER} --slots={slots}{options}"
    given = {"engine_command": command, "max_concurrent_requests": slots, **settings}
    return InferenceSettings(_env_file=None, default_model=str(model), **given)


def kill_server(engine: ServedEngine | ServedEmbedder) -> None:
    """Kill the server that `engine` has started."""
    process = engine._server.process
    assert process is not None
    assert process._process is not None
    process._process.kill()
