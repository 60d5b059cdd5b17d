"""When what is measured can be seen."""

import asyncio
import threading

from prometheus_client import Counter, Histogram

from forebay_contracts import metrics

SEEN = Counter("forebay_tests_seen", "Counted by tests", ("what",), registry=metrics.REGISTRY)
SECONDS = Histogram("forebay_tests_seconds", "Observed by tests", buckets=(1, 2), registry=metrics.REGISTRY)


def scraped(name: str, **labels: str) -> float | None:
    return metrics.REGISTRY.get_sample_value(name, labels)


def recorded(what: str) -> float:
    """What stands in the counter by itself, without the scrape that would bring it there."""
    return float(SEEN.labels(what)._value.get())


async def test_a_scrape_misses_nothing_that_was_measured_before_it() -> None:
    seen, seconds = metrics.bound(SEEN, "scraped"), metrics.bound(SECONDS)
    seen.inc()
    seen.inc(2)
    seconds.observe(1.5)
    seconds.observe(0.5)
    assert recorded("scraped") == 0
    assert scraped("forebay_tests_seen_total", what="scraped") == 3
    assert scraped("forebay_tests_seconds_sum") == 2.0
    assert scraped("forebay_tests_seconds_bucket", le="1.0") == 1


async def test_without_a_scrape_it_is_recorded_soon() -> None:
    amounts: asyncio.Queue[float] = asyncio.Queue()
    seen = metrics.Gathered(amounts.put_nowait)
    seen.inc()
    seen.inc(2)
    assert amounts.empty()
    async with asyncio.timeout(5):
        assert [await amounts.get(), await amounts.get()] == [1, 2]


def test_without_an_event_loop_it_is_recorded_at_once() -> None:
    metrics.record()
    metrics.bound(SEEN, "at once").inc()
    assert recorded("at once") == 1


async def test_nothing_is_lost_between_threads() -> None:
    seen, stop = metrics.bound(SEEN, "threads"), threading.Event()

    def scrape() -> None:
        while not stop.is_set():
            scraped("forebay_tests_seen_total", what="threads")

    scraping = threading.Thread(target=scrape)
    scraping.start()
    try:
        for _ in range(20_000):
            seen.inc()
    finally:
        stop.set()
        scraping.join()
    assert scraped("forebay_tests_seen_total", what="threads") == 20_000
