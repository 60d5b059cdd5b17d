"""When what is measured can be seen."""

import asyncio
import threading
from collections.abc import Iterator, Sequence

import prometheus_client
import pytest
from prometheus_client import CollectorRegistry, Counter, generate_latest

from forebay_contracts.telemetry import metrics
from forebay_contracts.telemetry.metrics import Histogram


@pytest.fixture
def counter() -> Iterator[Counter]:
    """In the registry for one test alone: others look at all that it holds."""
    counter = Counter("forebay_tests_seen", "Counted by tests", registry=metrics.REGISTRY)
    yield counter
    metrics.REGISTRY.unregister(counter)


@pytest.fixture
def histogram() -> Iterator[Histogram]:
    histogram = Histogram("forebay_tests_seconds", "Observed by tests", buckets=(1, 2), registry=metrics.REGISTRY)
    yield histogram
    metrics.REGISTRY.unregister(histogram)


def scraped(name: str, **labels: str) -> float | None:
    return metrics.REGISTRY.get_sample_value(name, labels)


def recorded(counter: Counter) -> float:
    """What stands in the counter by itself, without the scrape that would bring it there."""
    return float(counter._value.get())


async def test_a_scrape_misses_nothing_that_was_measured_before_it(counter: Counter, histogram: Histogram) -> None:
    seen, seconds = metrics.bound(counter), metrics.bound(histogram)
    seen.inc()
    seen.inc(2)
    seconds.observe(1.5)
    seconds.observe(0.5)
    assert recorded(counter) == 0
    assert scraped("forebay_tests_seen_total") == 3
    assert scraped("forebay_tests_seconds_sum") == 2.0
    assert scraped("forebay_tests_seconds_bucket", le="1.0") == 1


async def test_without_a_scrape_it_is_recorded_soon() -> None:
    recorded: asyncio.Queue[Sequence[float]] = asyncio.Queue()
    seen = metrics.Gathered(recorded.put_nowait)
    for _ in range(2):
        seen.inc()
        seen.inc(2)
        assert recorded.empty()
        async with asyncio.timeout(5):
            assert await recorded.get() == [1, 2]


def test_many_observations_in_one_step_are_as_good_as_one_by_one() -> None:
    amounts = (-1, 0, 0.5, 1, 1.0001, 2, 2, 3, float("inf"))
    registries = []
    for kind in (Histogram, prometheus_client.Histogram):
        registries.append(registry := CollectorRegistry())
        child = kind("seconds", "Of tests", ("model",), buckets=(1, 2), registry=registry).labels("m")
        if isinstance(child, Histogram):
            child.observe_many(amounts)
        else:
            for amount in amounts:
                child.observe(amount)
    ours, theirs = (generate_latest(registry).decode() for registry in registries)
    assert without_created(ours) == without_created(theirs)


def without_created(exposition: str) -> list[str]:
    """All but the time when the metric was made."""
    return [line for line in exposition.splitlines() if "seconds_created" not in line]


def test_without_an_event_loop_it_is_recorded_at_once(counter: Counter) -> None:
    metrics.record()
    metrics.bound(counter).inc()
    assert recorded(counter) == 1


async def test_nothing_is_lost_between_threads(counter: Counter) -> None:
    seen, stop = metrics.bound(counter), threading.Event()

    def scrape() -> None:
        while not stop.is_set():
            scraped("forebay_tests_seen_total")

    scraping = threading.Thread(target=scrape)
    scraping.start()
    try:
        for _ in range(20_000):
            seen.inc()
    finally:
        stop.set()
        scraping.join()
    assert scraped("forebay_tests_seen_total") == 20_000
