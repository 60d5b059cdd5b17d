"""What `bound` gives to whoever measures."""

import threading
from collections.abc import Iterator

import pytest
from prometheus_client import Counter, Gauge, Histogram

from forebay_contracts.settings import Settings, load
from forebay_contracts.telemetry import metrics


@pytest.fixture
def counter() -> Iterator[Counter]:
    """In the registry for one test alone: others look at all that it holds."""
    counter = Counter("forebay_tests_seen", "Counted by tests", ("model",), registry=metrics.REGISTRY)
    yield counter
    metrics.REGISTRY.unregister(counter)


@pytest.fixture
def _on_again() -> Iterator[None]:
    yield
    metrics.configure(load(Settings, _env_file=None))


def scraped(name: str, **labels: str) -> float | None:
    return metrics.REGISTRY.get_sample_value(name, labels)


def test_what_is_counted_is_in_the_next_scrape_for_its_labels_alone(counter: Counter) -> None:
    one, other = metrics.bound(counter, "one"), metrics.bound(counter, "other")
    one.inc()
    one.inc(2)
    assert scraped("forebay_tests_seen_total", model="one") == 3
    assert scraped("forebay_tests_seen_total", model="other") == 0
    other.inc()
    assert scraped("forebay_tests_seen_total", model="other") == 1


def test_nothing_is_lost_between_threads(counter: Counter) -> None:
    seen = metrics.bound(counter, "m")

    def count() -> None:
        for _ in range(5_000):
            seen.inc()

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert scraped("forebay_tests_seen_total", model="m") == 20_000


@pytest.mark.usefixtures("_on_again")
def test_what_is_switched_off_has_no_series_and_asks_for_no_value(counter: Counter) -> None:
    metrics.configure(load(Settings, _env_file=None, metrics="false"))
    gauge, histogram = Gauge("g", "Of tests", registry=None), Histogram("h", "Of tests", registry=None)
    asked: list[bool] = []
    metrics.bound(counter, "m").inc()
    metrics.bound(histogram).observe(1)
    metrics.bound(gauge).set_function(lambda: asked.append(True))
    assert scraped("forebay_tests_seen_total", model="m") is None
    assert [sample.value for family in histogram.collect() for sample in family.samples if "_count" in sample.name] == [
        0
    ]
    list(gauge.collect())
    assert asked == []
