"""`forebay up`: which models it can serve together, and what it says once it is ready."""

import shlex
from pathlib import Path
from typing import Any

import pytest

from forebay_cli.local import summary
from forebay_cli.local.deployment import Deployment
from forebay_contracts.wire.errors import ConfigurationError
from forebay_contracts.wire.heartbeats import WorkerInfo, WorkerStatus
from forebay_contracts.wire.request import POOLING, CompletionType

URL = "http://127.0.0.1:8091"


def worker(**fields: Any) -> WorkerInfo:
    common = {"version": "1", "started_at": 0, "heartbeat_at": 0, "engine": "transformers", "slots": 1}
    return WorkerInfo(**{"id": "w", "model": "org/it's", "status": WorkerStatus.READY} | common | fields)


def test_models_that_cannot_be_told_apart_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    two = Deployment({}, ["org/one", "org/two"], 2, verbose=False)
    assert [one.served_model for one in two.workers] == ["org/one", "org/one", "org/two", "org/two"]
    with pytest.raises(ConfigurationError, match=r"--model is given twice for what is org/one to clients"):
        Deployment({}, ["org/one", "org.one"], 1, verbose=False)
    monkeypatch.setenv("MODEL_NAME", "mine")
    assert Deployment({}, ["org/one"], 1, verbose=False).workers[0].served_model == "mine"
    with pytest.raises(ConfigurationError, match="MODEL_NAME is of one model, and --model is given 2 times"):
        Deployment({}, ["org/one", "org/two"], 1, verbose=False)


def test_the_request_to_copy_is_one_that_the_model_takes() -> None:
    words = shlex.split(summary.curl(URL, worker(), has_keys=False))
    assert words[:2] == ["curl", f"{URL}/v1/chat/completions"]
    assert words[-1] == '{"model": "org/it\'s", "messages": [{"role": "user", "content": "Hello"}]}'
    embeds = worker(completion_types=[CompletionType.EMBEDDING])
    assert f"{URL}/v1/embeddings " in summary.curl(URL, embeds, has_keys=False)
    assert '"Authorization: Bearer $API_KEY"' in summary.curl(URL, worker(completion_types=POOLING), has_keys=True)


def test_workers_of_one_kind_are_counted(tmp_path: Path) -> None:
    workers = [worker(quantization="nf4", device="cpu") for _ in range(2)] + [worker(model="m", quantization="none")]
    text = "\n".join(summary.lines(URL, "nats://127.0.0.1:4222", tmp_path, workers, has_keys=False))
    assert "  models  org/it's  (2 workers: transformers nf4 cpu)\n          m  (1 worker: transformers)\n" in text
    assert "  NATS    nats://127.0.0.1:4222\n" in text
