"""When what is measured can be seen."""

import asyncio
import threading
from collections.abc import Iterator

import pytest
from prometheus_client import Counter, Histogram

from forebay_contracts import metrics


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
    amounts: asyncio.Queue[float] = asyncio.Queue()
    seen = metrics.Gathered(amounts.put_nowait, sums=False)
    seen.inc()
    seen.inc(2)
    assert amounts.empty()
    async with asyncio.timeout(5):
        assert [await amounts.get(), await amounts.get()] == [1, 2]


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
