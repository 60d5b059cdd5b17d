"""`/metrics` of both services: the numbers against what was done, over real processes."""

import asyncio
import re
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics
from prometheus_client.parser import text_string_to_metric_families as prometheus_text

from support.metrics import defined
from support.nats import NatsServer
from support.stack import MODEL, Api, Service, Stack, running
from support.view import idle

DOCS = Path(__file__).parents[2] / "docs" / "observability.md"
NAME = f"HuggingFaceTB/{MODEL}"
OPEN_METRICS = "application/openmetrics-text; version=1.0.0"


class Samples:
    """What one scrape held."""

    def __init__(self, text: str, *, openmetrics: bool = False) -> None:
        parse = open_metrics if openmetrics else prometheus_text
        self._values = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in parse(text)
            for sample in family.samples
        }

    def __call__(self, name: str, **labels: str) -> float:
        """The value of one series, 0 where there is none."""
        return self._values.get((name, frozenset(labels.items())), 0.0)

    def labels(self, name: str) -> set[str]:
        """The names of the labels that any series of `name` has."""
        return {label for found, labels in self._values if found == name for label, _ in labels}


async def scrape(stack: Stack, service: Service, **headers: str) -> Samples:
    port = service.port if isinstance(service, Api) else int((await service.logged(r"metrics on 127.0.0.1:(\d+)"))[1])
    answer = await stack.http.get(f"http://127.0.0.1:{port}/metrics", headers=headers)
    assert answer.status_code == 200
    return Samples(answer.text, openmetrics=answer.headers["content-type"].startswith("application/openmetrics"))


async def shows(stack: Stack, service: Service, name: str, value: float) -> Samples:
    """Scrape until a gauge has this value, as a scraper does: it is told of nothing."""
    async with asyncio.timeout(20):
        while (found := await scrape(stack, service))(name) != value:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return found


async def test_the_numbers_are_those_of_what_was_done(nats_server: NatsServer) -> None:
    async with running(nats_server, metrics_port=0, max_queue_size=2, max_deliveries=2, api_keys="k") as stack:
        stack.http.headers["authorization"] = "Bearer k"
        for _ in range(3):
            assert (await stack.chat("one two [[tokens=4]]")).status_code == 200
        assert (await stack.chat("[[fail]]")).status_code == 500
        assert (await stack.chat("hi", model="made-up-by-a-client")).status_code == 404
        assert (await stack.chat("hi", temperature="hot")).status_code == 400
        running_one = asyncio.create_task(stack.chat("[[tokens=400 delay_ms=20]]"))
        running_id = (await stack.apis[0].logged(r"(\S+) queued for \S+ at 5$"))[1]
        await stack.workers[0].logged(f"{running_id} processing, attempt 1$")
        busy_worker = await shows(stack, stack.workers[0], "forebay_engine_batch_sequences", 1)
        waiting_one = asyncio.create_task(stack.chat("hi"))
        await stack.apis[0].logged(r"queued for \S+ at 6$")
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
        assert busy_worker("forebay_worker_slots") == busy_worker("forebay_worker_slots_busy") == 1
        assert busy_worker("forebay_engine_batch_sequences") == 1
        assert worker("forebay_worker_slots_busy") == worker("forebay_engine_batch_sequences") == 0

        assert api("forebay_requests_admitted_total", **chat) == 6
        outcomes = {"completed": 4, "failed": 1, "cancelled": 1, "timed_out": 0}
        for outcome, count in outcomes.items():
            assert api("forebay_requests_finished_total", **chat, outcome=outcome) == count
        assert api("forebay_request_seconds_count", **chat) == 6
        for reason in ("queue_full", "model_not_found", "invalid_request"):
            assert api("forebay_requests_rejected_total", reason=reason) == 1
        assert api("forebay_publish_seconds_count") == 7
        assert api("forebay_state_write_seconds_count") >= 1

        assert worker("forebay_queue_wait_seconds_count", model=NAME) == 6
        assert worker("forebay_request_redeliveries_total", model=NAME) == 1
        assert worker("forebay_time_to_first_token_seconds_count", model=NAME) >= 5
        assert worker("forebay_tokens_total", model=NAME, direction="input") >= 3 * 3
        assert worker("forebay_tokens_total", model=NAME, direction="output") >= 3 * 4 + 5
        assert worker("forebay_inter_token_seconds_count", model=NAME) >= 3 * 3
        assert worker("forebay_inter_token_seconds_sum", model=NAME) > 0


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
            assert found("forebay_request_seconds_count", model=NAME, type="chat") == 12
            assert found("forebay_queue_up") == 1


async def test_gauges_outlive_nats_only_as_absent(nats_server: NatsServer) -> None:
    async with running(nats_server, workers=0) as stack:
        await asyncio.to_thread(nats_server.stop)
        await stack.apis[0].logged("connection to NATS lost")
        found = await scrape(stack, stack.apis[0])
        assert found("forebay_queue_up") == 0
        assert not found.labels("forebay_queue_waiting")
        await asyncio.to_thread(nats_server.start)


@pytest.mark.parametrize("where", ["api", "worker"])
async def test_metrics_off(nats_server: NatsServer, where: str) -> None:
    async with running(nats_server, metrics="false", metrics_port=0) as stack:
        assert (await stack.chat("hi")).status_code == 200
        if where == "api":
            assert (await stack.http.get(f"{stack.apis[0].url}/metrics")).status_code == 404
        else:
            assert not [line for line in stack.workers[0].log if "metrics on" in line]


async def test_a_taken_port_is_refused_at_start(nats_server: NatsServer) -> None:
    async with running(nats_server, workers=0) as stack:
        worker = Service("forebay_inference", re.compile(""), stack.env(metrics_port=stack.apis[0].port))
        stack.workers.append(worker)
        await worker.launch()
        assert await worker.ended() == 2
        assert f"cannot serve metrics on 127.0.0.1:{stack.apis[0].port}" in worker.log[-1]


def test_the_docs_hold_every_metric() -> None:
    documented = set(re.findall(r"^\| `(forebay_\w+)`", DOCS.read_text(), re.MULTILINE))
    assert documented == set(defined())


def test_names_and_labels_keep_to_the_conventions() -> None:
    for name, family in defined().items():
        assert re.fullmatch(r"[a-z][a-z_]+", name)
        assert family.documentation
        if family.type == "histogram":
            assert name.endswith("_seconds")
