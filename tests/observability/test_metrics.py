"""`/metrics` of both services: the numbers against what was done, over real processes."""

import asyncio
import math
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics
from prometheus_client.parser import text_string_to_metric_families as prometheus_text

from forebay_contracts import keys
from forebay_contracts.nats.connection import connected
from forebay_contracts.queueing.state_store import KeyValueStateStore
from forebay_contracts.settings import Settings, load
from forebay_contracts.telemetry.metrics import REGISTRY
from forebay_contracts.wire.errors import QueueUnavailable
from forebay_contracts.wire.state import RequestState, RequestStatus
from support.answers import chat_body
from support.metrics import defined
from support.nats import NatsServer
from support.service import Api, Worker
from support.stack import MODEL, Stack, data_dir, running
from support.view import idle

MODEL_DIR = data_dir()
"""Read here: a test's own environment has no DATA_DIR."""
NAME = f"HuggingFaceTB/{MODEL}"
OPEN_METRICS = "application/openmetrics-text; version=1.0.0"
MADE_UP = "made-up-by-a-client"
LABELS = {"model", "type", "outcome", "reason", "key", "result", "operation", "status", "direction", "endpoint"}
"""All that there are: each takes few values, and none that a client can make up."""


class Samples:
    """What one scrape held."""

    def __init__(self, text: str, *, openmetrics: bool = False) -> None:
        self.text = text
        parse = open_metrics if openmetrics else prometheus_text
        self._values = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in parse(text)
            for sample in family.samples
        }

    def __call__(self, name: str, **labels: str) -> float:
        """The value of one series, which must be there: a misspelt one is none that is 0."""
        key = (name, frozenset(labels.items()))
        assert key in self._values, f"no series {name} {labels}"
        return self._values[key]

    def absent(self, name: str) -> bool:
        """Whether there is no series of this name at all."""
        return all(found != name for found, _ in self._values)


async def scrape(stack: Stack, service: Api | Worker, **headers: str) -> Samples:
    answer = await stack.http.get(f"{service.url}/metrics", headers=headers)
    assert answer.status_code == 200
    return Samples(answer.text, openmetrics=answer.headers["content-type"].startswith("application/openmetrics"))


async def shows(stack: Stack, service: Api | Worker, name: str, value: float, **labels: str) -> Samples:
    """Scrape until a gauge has this value, as a scraper does: it is told of nothing."""
    async with asyncio.timeout(20):
        while (found := await scrape(stack, service))(name, **labels) != value:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return found


async def test_the_numbers_are_those_of_what_was_done(nats_server: NatsServer) -> None:
    async with running(nats_server, metrics_port=0, max_queue_size=2, max_deliveries=2, api_keys="k") as stack:
        stack.http.headers["authorization"] = "Bearer k"
        for _ in range(3):
            assert (await stack.chat("one two [[tokens=4]]")).status_code == 200
        stack.http.headers["idempotency-key"] = "once"
        assert (await stack.chat("[[fail]]")).status_code == 500
        del stack.http.headers["idempotency-key"]
        assert (await stack.chat("hi", model=MADE_UP)).status_code == 404
        assert (await stack.chat("hi", temperature="hot")).status_code == 400
        running_one = asyncio.create_task(stack.chat("[[tokens=400 delay_ms=20]]"))
        await stack.taken(5, RequestStatus.PROCESSING)
        busy_worker = await shows(stack, stack.workers[0], "forebay_engine_batch_sequences", 1)
        waiting_one = asyncio.create_task(stack.chat("hi"))
        await stack.taken(6)
        assert (await stack.chat("hi")).status_code == 503
        busy_api = await scrape(stack, stack.apis[0])
        running_one.cancel()
        assert (await waiting_one).status_code == 200
        await idle(stack)
        worker = await shows(stack, stack.workers[0], "forebay_worker_slots_busy", 0)
        # Gauges are read once a second at most; what the api counts itself is never old.
        api = await scrape(stack, stack.apis[0], accept=OPEN_METRICS)

        chat = {"model": NAME, "type": "chat"}
        assert busy_api("forebay_queue_waiting", model=NAME) == 1
        assert busy_api("forebay_queue_processing", model=NAME) == 1
        assert busy_api("forebay_queue_max_size") == 2
        assert busy_api("forebay_queue_max_concurrent", model=NAME) == 1
        assert busy_api("forebay_workers", model=NAME, status="ready") == 1
        assert busy_api("forebay_queue_up") == 1
        assert busy_api("forebay_answer_log_bytes") > 0
        assert busy_api("forebay_answer_log_max_bytes") == 2**30
        assert busy_worker("forebay_worker_slots") == busy_worker("forebay_worker_slots_busy") == 1
        assert busy_worker("forebay_engine_batch_sequences") == 1
        assert worker("forebay_worker_slots_busy") == worker("forebay_engine_batch_sequences") == 0
        # The simulated engine has no cache.
        assert math.isnan(worker("forebay_engine_kv_cache_usage_ratio"))

        assert api("forebay_requests_admitted_total", **chat) == 6
        outcomes = {"completed": 4, "failed": 1, "cancelled": 1, "timed_out": 0}
        for outcome, count in outcomes.items():
            assert api("forebay_requests_finished_total", **chat, outcome=outcome) == count
            assert api("forebay_request_seconds_count", **chat, outcome=outcome) == count
            assert api("forebay_stored_requests_finished_total", model=NAME, outcome=outcome) == (outcome == "failed")
        assert api("forebay_key_requests_total", key="key-1", result="admitted") == 6
        for reason in ("queue_full", "model_not_found", "invalid_request"):
            assert api("forebay_requests_rejected_total", reason=reason) == 1
        assert api("forebay_publish_seconds_count") == 7
        assert api("forebay_state_seconds_count", operation="write") >= 1
        # Five ended at the worker; the api cancelled the sixth.
        for operation, least in {"read": 1, "write": 5, "count": 5}.items():
            assert worker("forebay_state_seconds_count", operation=operation) >= least
        for found in (api, worker):
            assert NAME in found.text
            assert MADE_UP not in found.text

        assert worker("forebay_queue_wait_seconds_count", model=NAME) == 6
        assert worker("forebay_request_redeliveries_total", model=NAME) == 1
        assert worker("forebay_time_to_first_token_seconds_count", model=NAME) >= 5
        assert worker("forebay_tokens_total", model=NAME, direction="input") >= 3 * 3
        assert worker("forebay_tokens_total", model=NAME, direction="output") >= 3 * 4 + 5
        assert worker("forebay_inter_token_seconds_count", model=NAME) >= 3 * 3
        assert worker("forebay_inter_token_seconds_sum", model=NAME) > 0


@pytest.mark.model
@pytest.mark.timeout(600)
async def test_the_cache_of_a_real_model_is_in_use_while_it_answers(nats_server: NatsServer) -> None:
    settings = {"inference_engine": "transformers", "model_quantization": "nf4", "data_dir": MODEL_DIR}
    async with running(nats_server, workers=0, metrics_port=0, request_timeout=300, **settings) as stack:
        worker = await stack.worker(within_s=500)  # what a first run takes
        task = asyncio.create_task(stack.chat("Count to one thousand.", max_tokens=500))
        busy = await shows(stack, worker, "forebay_engine_batch_sequences", 1)
        async with asyncio.timeout(60):
            while not 0 < busy("forebay_engine_kv_cache_usage_ratio") <= 1:
                await asyncio.sleep(0.01)
                busy = await scrape(stack, worker)
        assert busy("forebay_worker_slots_busy") == 1
        task.cancel()


async def test_processes_of_one_api_are_counted_together(nats_server: NatsServer) -> None:
    async with running(nats_server, api_processes=3) as stack:
        for _ in range(12):
            # A connection each, so that the processes share them.
            answer = await stack.chat("hi", api=0)
            assert answer.status_code == 200
            stack.http._transport, old = type(stack.http._transport)(), stack.http._transport
            await old.aclose()
        await idle(stack)
        for _ in range(5):
            found = await scrape(stack, stack.apis[0])
            assert found("forebay_requests_admitted_total", model=NAME, type="chat") == 12
            assert found("forebay_request_seconds_count", model=NAME, type="chat", outcome="completed") == 12
            assert found("forebay_queue_up") == 1


async def test_gauges_outlive_nats_only_as_absent(nats_server: NatsServer) -> None:
    async with running(nats_server) as stack:
        found = await scrape(stack, stack.apis[0])
        assert not found.absent("forebay_queue_waiting")
        assert not found.absent("forebay_queue_max_size")
        await asyncio.to_thread(nats_server.stop)
        await stack.loses_nats(stack.apis[0])
        found = await shows(stack, stack.apis[0], "forebay_queue_up", 0)
        assert found.absent("forebay_queue_waiting")
        assert found.absent("forebay_queue_max_size")
        assert found.absent("forebay_answer_log_bytes")
        assert (await stack.chat("hi")).status_code == 503
        found = await scrape(stack, stack.apis[0])
        assert found("forebay_requests_rejected_total", reason="queue_unavailable") == 1
        await asyncio.to_thread(nats_server.start)


async def test_every_reason_to_reject_is_counted(nats_server: NatsServer, tmp_path: Path) -> None:
    """But queue_unavailable: the test before."""
    key = keys.make()
    file = tmp_path / "keys.toml"
    file.write_text(keys.written("alice", key, max_requests=1, operator=False))
    settings = {
        "api_keys_file": file,
        "api_keys": "a-key-without-a-bound",
        "max_queue_size": 1,
        "max_request_bytes": 4096,
        "answer_log_bytes": 2**20,
        "no_worker_policy": "refuse",
    }
    async with running(nats_server, **settings) as stack:

        async def answered(text: str, with_key: str = "a-key-without-a-bound", **fields: Any) -> int:
            answer = await stack.http.post(
                f"{stack.apis[0].url}/v1/chat/completions",
                json=chat_body(text) | fields,
                headers={"authorization": f"Bearer {with_key}"},
            )
            return answer.status_code

        assert await answered("hi", with_key=MADE_UP) == 401
        assert await answered("hi", model=MADE_UP) == 404
        assert await answered("x" * 5000) == 413
        assert await answered("hi", temperature="hot") == 400
        await stack.connection.jetstream.publish("inference.answers.a-large-one", b"x" * 950_000)
        refused = await stack.http.post(
            f"{stack.apis[0].url}/v1/chat/completions",
            json=chat_body("hi"),
            headers={"authorization": "Bearer a-key-without-a-bound", "idempotency-key": "once"},
        )
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "60")
        assert refused.json()["error"]["code"] == "answer_log_full"
        slow = asyncio.create_task(answered("[[tokens=2000 delay_ms=500]]", with_key=key))
        await stack.begins()
        assert await answered("hi", with_key=key) == 429
        assert await answered("hi") == 503
        slow.cancel()
        await stack.workers[0].stop()
        await shows(stack, stack.apis[0], "forebay_workers", 0, model=NAME, status="ready")
        assert await answered("hi") == 503
        found = await scrape(stack, stack.apis[0])
        for reason in (
            "queue_full",
            "answer_log_full",
            "model_unavailable",
            "model_not_found",
            "invalid_api_key",
            "request_too_large",
            "key_limit_reached",
            "invalid_request",
        ):
            assert found("forebay_requests_rejected_total", reason=reason) == 1, reason
        assert MADE_UP not in found.text


async def test_what_times_out_is_counted_so(nats_server: NatsServer) -> None:
    async with running(nats_server, request_timeout=1) as stack:
        assert (await stack.chat("[[tokens=2000 delay_ms=500]]")).status_code == 408
        found = await scrape(stack, stack.apis[0])
        ended = {"model": NAME, "type": "chat", "outcome": "timed_out"}
        assert found("forebay_requests_finished_total", **ended) == 1
        # A timer of uvloop counts in whole milliseconds and may be up to one early.
        assert found("forebay_request_seconds_sum", **ended) >= 0.99


async def test_what_nats_does_not_answer_takes_its_time_too(nats_server: NatsServer) -> None:
    state = RequestState(
        id="a", status=RequestStatus.QUEUED, completion_type="chat", timestamp=1, model=NAME, queued_at=1, deadline=2
    )
    # Nobody has made the bucket and the counters.
    async with connected(load(Settings, nats_url=nats_server.url, _env_file=None), "forebay-tests") as connection:
        store = KeyValueStateStore(connection)
        before = state_operations()
        for operation in (store.get("a"), store.write(state, 0), store.count(RequestStatus.FAILED, "a")):
            with pytest.raises(QueueUnavailable):
                await operation
        assert [after - count for after, count in zip(state_operations(), before, strict=True)] == [1, 1, 1]


def state_operations() -> list[float]:
    """How many reads, writes and counts this process has measured."""
    return [
        REGISTRY.get_sample_value("forebay_state_seconds_count", {"operation": operation}) or 0
        for operation in ("read", "write", "count")
    ]


@pytest.mark.parametrize("where", ["api", "worker"])
async def test_metrics_off(nats_server: NatsServer, where: str) -> None:
    async with running(nats_server, metrics="false", metrics_port=0) as stack:
        assert (await stack.chat("hi")).status_code == 200
        if where == "api":
            assert (await stack.http.get(f"{stack.apis[0].url}/metrics")).status_code == 404
        else:
            assert (await stack.http.get(f"{stack.workers[0].url}/metrics")).status_code == 404


async def test_a_taken_port_is_refused_at_start(nats_server: NatsServer) -> None:
    async with running(nats_server, workers=0) as stack:
        worker = await stack.launched_worker(metrics_port=stack.apis[0].port)
        assert await worker.ended() == 2
        assert f"cannot serve metrics on 127.0.0.1:{stack.apis[0].port}" in worker.log[-1]


def test_names_and_labels_keep_to_the_conventions() -> None:
    for name, metric in defined().items():
        assert re.fullmatch(r"[a-z][a-z_]+", name)
        assert metric.documentation
        assert metric.labels <= LABELS
        if metric.type == "histogram":
            assert name.endswith("_seconds")
