"""What a person sees of the queue on a terminal of 80 columns and 24 lines: all of it."""

import io
import time

import pytest
from nats.js.api import StreamConfig, StreamInfo, StreamState
from rich.console import Console, Group
from rich.table import Table

from forebay_cli import console
from forebay_cli.commands import plan, status, topology, usage
from forebay_cli.commands.plan import fit_all
from forebay_cli.commands.requests import request_table, requests_table
from forebay_contracts.queueing.status import ModelQueue, QueueStatus
from forebay_contracts.queueing.usage import UsageRow
from forebay_contracts.sizing.model_shape import of_params
from forebay_contracts.wire.heartbeats import WorkerInfo, WorkerStatus
from forebay_contracts.wire.state import RequestState, RequestStatus, Usage

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
REQUEST_ID = "0b5d7c1e-8a52-4c0e-9a55-3d2f0e7f1a6b"
ERROR = "The request was not finished within REQUEST_TIMEOUT (300 s) of its arrival."
FAULT = "attempt 3 on worker forebay-inference-7d8f9c6b5-x2x4z-1-a1b2c3: CUDA out of memory"


def request() -> RequestState:
    now = time.time()
    return RequestState(
        id=REQUEST_ID,
        status=RequestStatus.TIMED_OUT,
        completion_type="completion",
        timestamp=now,
        error=ERROR,
        fault=FAULT,
        model=MODEL,
        attempt=3,
        queued_at=now - 400,
        started_at=now - 350,
        finished_at=now,
        deadline=now - 100,
        worker="forebay-inference-7d8f9c6b5-x2x4z-1-a1b2c3",
        usage=Usage(prompt_tokens=12, completion_tokens=3456),
    )


def printed(made: Table) -> str:
    terminal = Console(width=80, file=io.StringIO())
    console.print_tables(made, on=terminal)
    assert isinstance(terminal.file, io.StringIO)
    return terminal.file.getvalue()


def test_a_narrow_terminal_loses_nothing_of_a_request() -> None:
    text = printed(requests_table([request()], 80))
    assert all(len(line.rstrip()) <= 80 for line in text.splitlines()), text
    (_, _, heads, more, _, first, second, *folds) = (line.rstrip() for line in text.splitlines())
    assert (heads.split(), more.split()) == (
        ["id", "status", "queued", "waited", "error"],
        ["model", "type", "attempt", "ran", "tokens"],
    )
    assert first.split()[:2] == [REQUEST_ID, "timed_out"]
    assert second.split()[:4] == [MODEL, "completion", "3", "350.00"]
    error = "".join(line[heads.index("error") :].strip() for line in (first, second, *folds)).replace(" ", "")
    assert error == f"{ERROR} ({FAULT})3456".replace(" ", "")


def test_a_wide_terminal_has_a_line_a_request() -> None:
    assert len(requests_table([request()]).columns) == 10


def test_the_other_tables_fit_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console.stdout, "width", 80)
    used = UsageRow(
        day="2026-11-30",
        model=MODEL,
        key="a-team-with-a-long-name",
        requests=1_234_567,
        prompt_tokens=123_456_789,
        cached_tokens=12_345_678,
        completion_tokens=12_345_678,
        queue_seconds=12_345.6,
    )
    model = of_params("8B", 8_000_000_000)
    fits = fit_all(model, 24 << 30, 8192, None, requests_per_slot=50)
    config = StreamConfig(name="KV_inference-responses", subjects=["$KV.inference-responses.>"], max_age=31_536_000)
    state = StreamState(messages=123_456, bytes=2**30, first_seq=1, last_seq=123_456, consumer_count=1)
    stream = StreamInfo(config=config, state=state)
    for made in (
        console.table(usage.TITLE, (*usage.GROUPS, *usage.COUNTS), [usage._cells(used, usage.GROUPS)]),
        console.table("8B", plan.COLUMNS, [plan._row(model, one) for one in fits]),
        topology._table("Streams", [topology._stream_row(stream)]),
    ):
        text = printed(made)
        assert all(len(line.rstrip()) <= 80 for line in text.splitlines()), text


def test_names_stay_whole_beside_values_that_fold() -> None:
    text = printed(request_table(request(), ["So far.", "[b]Another.[/b]"]))
    values: dict[str, str] = {}
    for line in text.splitlines()[1:]:
        name, value = line[1:20].split(" ")[0], line[1:].split(maxsplit=1)
        if name:
            values[name] = value[1].strip() if len(value) > 1 else ""
        elif value:
            values[list(values)[-1]] += " " + " ".join(value).strip()
    assert values["error"] == ERROR
    assert values["fault"].replace(" ", "") == FAULT.replace(" ", "")
    assert (values["answer"], values["answer_1"]) == ("So far.", "[b]Another.[/b]")
    assert {"completion_type", "completion_tokens", "cached_tokens", "waited", "ran"} <= values.keys()
    assert all(len(line) <= 80 for line in text.splitlines())


def test_workers_are_seen_on_a_small_terminal() -> None:
    worker = WorkerInfo(
        id="gpu-node-1-31337-a1b2c3",
        version="0.2.0.dev12",
        started_at=0,
        heartbeat_at=0,
        model=MODEL,
        status=WorkerStatus.LOADING,
        progress="fetching model.safetensors 37 %",
        slots=16,
        busy=3,
        quantization="nf4",
        device="cuda:0",
        engine="transformers",
    )
    numbers = QueueStatus(
        queue_size=1,
        processing_count=3,
        max_concurrent=16,
        max_queue_size=100,
        total_processed=123_456,
        total_failed=12,
        total_queued=123_472,
        active_requests=4,
        is_running=True,
        total_timed_out=1,
        total_cancelled=2,
        workers=1,
        workers_ready=0,
        models=(
            ModelQueue(
                model=MODEL,
                consumer="x",
                waiting=1,
                processing=3,
                max_concurrent=16,
                delivered=3,
                paused_until=4_000_000_000.0,
            ),
        ),
    )
    shown = status.tables(numbers, [worker])
    terminal = Console(width=80, file=io.StringIO())
    terminal.print(Group(*shown))
    assert isinstance(terminal.file, io.StringIO)
    text = terminal.file.getvalue()
    assert len(text.splitlines()) <= 24, text
    for cell in (worker.id, "3/16", "total_processed", "123456", "3/16", "2096-10-02"):
        assert cell in text
    assert "…" not in text
    assert text.index(worker.id) < text.index("total_processed")
