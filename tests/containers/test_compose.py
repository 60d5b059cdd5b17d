"""deploy/compose.yaml on the images just built: two apis behind one port, two workers, and the loss of each."""

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from forebay_inference.models.store import ensure_model
from support.containers import Compose, becomes_healthy, docker, inspect, log, logged
from support.stack import data_dir

pytestmark = [pytest.mark.containers, pytest.mark.timeout(300)]

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
IDLE_WITHIN_S = 10
MODEL = "SmolLM2-135M-Instruct"
SIMULATED = """\
INFERENCE_ENGINE=simulated
MAX_CONCURRENT_REQUESTS=4
WORKER_SLOTS=2
ACK_WAIT=2
"""


class System:
    """The compose project, and a client of its one port."""

    def __init__(self, compose: Compose) -> None:
        self.compose = compose
        self.url = f"http://{compose('port', 'proxy', '8091')}"
        # What fails shall fail: no second try.
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0, timeout=60)

    def idle(self) -> dict[str, Any]:
        """The queue's status once the last request is acknowledged, which comes after it was counted.

        An answer reaches its client a moment before that, and an ack leaves no event to wait for.
        """
        deadline = time.monotonic() + IDLE_WITHIN_S
        while True:
            status: dict[str, Any] = httpx.get(f"{self.url}/v1/queue/status").raise_for_status().json()
            if status["active_requests"] == 0:
                return status
            assert time.monotonic() < deadline, status
            time.sleep(0.05)

    def chat(self, orders: str) -> tuple[str | None, str]:
        """A whole answer; its text, and the request's id."""
        raw = self.openai.chat.completions.with_raw_response.create(model=MODEL, messages=_messages(orders))
        return raw.parse().choices[0].message.content, raw.headers["x-request-id"]

    def stream(self, orders: str) -> tuple[Iterator[str], str]:
        """The pieces of an answer as they come, and the request's id."""
        stream = self.openai.chat.completions.create(model=MODEL, messages=_messages(orders), stream=True)
        pieces = (chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
        return pieces, stream.response.headers["x-request-id"]

    def with_line(self, service: str, line: str) -> str:
        """The container of a service whose log has a line."""
        found = [container for container in self.compose.containers(service) if line in log(container)]
        assert len(found) == 1, f"{line!r} is in the logs of {found}"
        return found[0]


def _messages(text: str) -> Any:
    return [{"role": "user", "content": text}]


def _tokens(count: int) -> str:
    return " ".join(f"t{token}" for token in range(count))


@contextlib.contextmanager
def _composed(config: str, folder: Path, **settings: str) -> Iterator[System]:
    """The system with these settings; afterwards nothing of it is left."""
    file = folder / "queue-config.env"
    file.write_text(config)
    # Port 0: the engine takes a free one.
    compose = Compose(f"forebay-{folder.name}-{os.getpid()}", FOREBAY_CONFIG=str(file), FOREBAY_PORT="0", **settings)
    try:
        compose.up()
        yield System(compose)
    finally:
        compose("down", "--volumes", "--timeout", "10")
    assert compose.left() == ""


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    with _composed(SIMULATED, tmp_path_factory.mktemp("simulated")) as system:
        yield system


def test_both_apis_answer_through_one_port(system: System) -> None:
    requests = [system.chat("[[tokens=3]]") for _ in range(8)]
    assert [text for text, _ in requests] == [_tokens(3)] * 8
    logs = [log(container) for container in system.compose.containers("api")]
    answered = [{request_id for _, request_id in requests if request_id in lines} for lines in logs]
    assert len(answered) == 2
    assert all(answered), "one api got nothing"
    assert not answered[0] & answered[1]


def test_a_stream_comes_as_it_is_made(system: System) -> None:
    pieces, request_id = system.stream("[[tokens=40 delay_ms=50]]")
    first = next(pieces)
    # Its state is asked of either api.
    assert httpx.get(f"{system.url}/v1/queue/request/{request_id}").json()["status"] == "processing"
    assert first + "".join(pieces) == _tokens(40)


def test_a_killed_worker_breaks_no_stream(system: System) -> None:
    before = system.idle()
    assert before["workers_ready"] == 2
    pieces, request_id = system.stream("[[tokens=60 delay_ms=50]]")
    text = "".join(next(pieces) for _ in range(12))
    worker = system.with_line("inference", f"{request_id} processing, attempt 1")
    docker("kill", "--signal", "KILL", worker)
    assert inspect(worker)["State"]["Running"] is False
    text += "".join(pieces)
    assert text == _tokens(60)
    other = system.with_line("inference", f"{request_id} processing, attempt 2")
    assert other != worker
    api = system.with_line("api", f"{request_id} received")
    logged(api, f"{request_id} completed .* attempt 2")
    after = system.idle()
    assert after["total_processed"] - before["total_processed"] == 1
    assert after["total_failed"] == before["total_failed"]
    assert (after["queue_size"], after["processing_count"]) == (0, 0)
    docker("start", worker)
    becomes_healthy(worker)


def test_a_stopped_api_finishes_what_it_has(system: System) -> None:
    pieces, request_id = system.stream("[[tokens=100 delay_ms=50]]")
    text = next(pieces)
    api = system.with_line("api", f"{request_id} received")
    stopping = subprocess.Popen(["docker", "stop", "--time", "45", api], stdout=subprocess.DEVNULL)
    meanwhile = []
    for number, piece in enumerate(pieces):
        text += piece
        if number % 10 == 0:
            meanwhile.append(system.chat("[[tokens=1]]")[0])
    assert text == _tokens(100)
    assert set(meanwhile) == {"t0"}, "a client was refused while one of two apis left"
    assert stopping.wait() == 0
    assert inspect(api)["State"]["ExitCode"] == 0
    docker("start", api)
    becomes_healthy(api)
    assert system.idle()["total_failed"] == 0


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the default model, that belongs to nobody whom the containers know: no network brings it there."""
    folder = tmp_path_factory.mktemp("models")
    made = ensure_model(DEFAULT_MODEL, data_dir(), print)
    shared = folder / "models" / made.name
    shutil.copytree(made, shared)
    for path in (folder, folder / "models", shared, *shared.iterdir()):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder


@pytest.mark.model
@pytest.mark.timeout(600)
def test_the_real_model_answers(tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    started = time.monotonic()
    with _composed("", tmp_path, FOREBAY_MODELS=str(models)) as system:
        took = time.monotonic() - started
        answer = system.openai.chat.completions.create(
            model=MODEL, messages=_messages("What is the capital of France?"), temperature=0, max_tokens=12
        )
        text = answer.choices[0].message.content or ""
    with capsys.disabled():
        print(f"\nwith the real model: healthy {took:.1f} s after compose up; {text!r}")
    assert "Paris" in text
