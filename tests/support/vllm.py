"""The real vLLM on the CPU, serving the default model."""

import os
import shlex
from pathlib import Path
from typing import Any

from forebay_contracts.settings import InferenceSettings
from forebay_inference.engine.served.embedder import ServedEmbedder
from forebay_inference.engine.served.engine import ServedEngine
from forebay_inference.engine.served.pooling import Task, VLLMPooling
from forebay_inference.engine.served.reranker import ServedReranker
from forebay_inference.engine.served.vllm import VLLM

# Read before the settings of the machine are hidden from the tests.
DATA_DIR = Path(os.environ.get("DATA_DIR") or Path.home() / ".cache" / "forebay")
PYTHON = os.environ.get("VLLM_PYTHON", "")
START_S = 400
"""Most seconds until it serves: 45 on two cores of their own, without compiling."""


def settings(*arguments: str, **fields: Any) -> dict[str, Any]:
    """The settings of a worker with a vLLM of its own, which gets `arguments` too."""
    given = {"inference_engine": "vllm", "data_dir": DATA_DIR, "engine_python": PYTHON, **fields}
    command = VLLM().command(InferenceSettings(_env_file=None, **given))
    return {**given, "engine_command": shlex.join([*command, "--enforce-eager", *arguments])}


def vllm_engine(*arguments: str, **fields: Any) -> ServedEngine:
    """An engine that has not started, with a vLLM of its own."""
    return ServedEngine(InferenceSettings(_env_file=None, **settings(*arguments, **fields)), VLLM())


def vllm_embedder(folder: Path, **fields: Any) -> ServedEmbedder:
    """The same for the vectors of the model in `folder`."""
    return ServedEmbedder(*_pooling(folder, "embed", fields))


def vllm_reranker(folder: Path, **fields: Any) -> ServedReranker:
    """The same for its scores."""
    return ServedReranker(*_pooling(folder, "rerank", fields))


def _pooling(folder: Path, task: Task, fields: dict[str, Any]) -> tuple[InferenceSettings, VLLMPooling]:
    given = InferenceSettings(_env_file=None, default_model=str(folder), engine_python=PYTHON, **fields)
    dialect = VLLMPooling(task)
    command = shlex.join([*dialect.command(given), "--enforce-eager"])
    return given.model_copy(update={"engine_command": command}), dialect
