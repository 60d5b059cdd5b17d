import time
from collections.abc import Callable

import pytest

from forebay_api.watching.drain_rate import MAX_RETRY_AFTER_S, WINDOW_S, DrainRate


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the clock."""

    def set_clock(seconds: float) -> None:
        monkeypatch.setattr(time, "monotonic", lambda: seconds)

    return set_clock


def sampled(at: Callable[[float], None], *samples: tuple[float, int]) -> DrainRate:
    rate = DrainRate()
    for seconds, left in samples:
        at(seconds)
        rate.sample(left)
    return rate


def test_nothing_is_said_before_it_is_known(at: Callable[[float], None]) -> None:
    assert sampled(at).retry_after_s() is None
    assert sampled(at, (0, 5)).retry_after_s() is None
    assert sampled(at, (0, 5), (10, 5)).retry_after_s() is None
    assert sampled(at, (0, 5), (0.05, 6)).wait_s(1) is None


@pytest.mark.parametrize(
    ("left", "retry_after_s", "wait_of_ten_s"), [(1, 10, 100.0), (20, 1, 5.0), (1000, 1, 0.1), (4, 3, 25.0)]
)
def test_from_the_rate_of_the_window(
    at: Callable[[float], None], left: int, retry_after_s: int, wait_of_ten_s: float
) -> None:
    rate = sampled(at, (0, 0), (10, left))
    assert rate.retry_after_s() == retry_after_s
    assert rate.wait_s(10) == pytest.approx(wait_of_ten_s)


def test_retry_after_is_bounded(at: Callable[[float], None]) -> None:
    rate = sampled(at, (0, 0), (59, 1))
    assert rate.retry_after_s() == 59
    assert sampled(at, (0, 0), (60, 1)).retry_after_s() == MAX_RETRY_AFTER_S
    assert sampled(at, (0, 0), (0.2, 100)).retry_after_s() == 1


def test_what_is_old_counts_no_more(at: Callable[[float], None]) -> None:
    rate = sampled(at, (0, 0), (10, 1000))
    at(10 + WINDOW_S + 1)
    assert rate.wait_s(1) is None
    rate.sample(1001)
    assert rate.wait_s(1) is None  # one sample is left in the window
    assert sampled(at, (0, 0), (50, 1000), (100, 1010)).wait_s(1) == pytest.approx(5)


def test_a_count_that_began_anew_begins_the_measurement_anew(at: Callable[[float], None]) -> None:
    assert sampled(at, (0, 500), (10, 3)).wait_s(1) is None
    assert sampled(at, (0, 500), (10, 3), (20, 13)).wait_s(1) == pytest.approx(1)


def test_any_number_of_looks_takes_little_memory(at: Callable[[float], None]) -> None:
    rate = sampled(at, *((number / 100, number) for number in range(20_000)))
    assert len(rate._samples) <= WINDOW_S + 2
    assert rate.wait_s(100) == pytest.approx(1, rel=0.05)


def test_time_without_work_says_nothing_of_the_rate(at: Callable[[float], None]) -> None:
    rate = DrainRate()
    for seconds, left, busy in [(0, 1000, False), (30, 1000, False), (58, 1000, True), (60, 1002, True)]:
        at(seconds)
        rate.sample(left, busy=busy)
    assert rate.wait_s(1) == pytest.approx(1)
    at(61.5)
    rate.sample(1002, busy=False)
    assert rate.wait_s(1) == pytest.approx(1.75)
    at(90)
    rate.sample(1002, busy=True)
    assert rate.wait_s(1) == pytest.approx(1.75)
