"""When torch's threads spin for each other, and when they yield."""

import threading
from collections.abc import Iterator

import pytest

from forebay_inference.engine.transformers import waiting


def decisions(monkeypatch: pytest.MonkeyPatch, *times: tuple[int, int] | None) -> list[bool]:
    """Whether the threads were made to yield, each time that this was decided; `times` are of the looks in turn."""
    monkeypatch.setattr(waiting, "_INTERVAL_S", 0)
    made: list[bool] = []
    told: Iterator[tuple[int, int] | None] = iter(times)
    look = waiting._every_interval(made.append, lambda: next(told))
    for _ in times[1:]:
        look()
    return made


def test_threads_yield_at_once_where_others_want_the_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decisions(monkeypatch, (0, 0), (100, 1), (200, 41)) == [True]


def test_threads_spin_again_after_some_calm(monkeypatch: pytest.MonkeyPatch) -> None:
    calm = [(100 * number, 50) for number in range(1, 7)]
    assert decisions(monkeypatch, (0, 0), (50, 50), *calm) == [True, False]


def test_threads_yield_where_the_kernel_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decisions(monkeypatch, None, None) == [True]


def test_the_kernel_tells_how_long_threads_ran_and_waited() -> None:
    times = waiting.cpu_times()
    assert times is None or (times[0] > 0 and times[1] >= 0)


def test_a_second_team_ends_when_it_is_released() -> None:
    others = set(threading.enumerate())  # an engine of another test may have one

    def alive() -> list[threading.Thread]:
        return [one for one in threading.enumerate() if one.name == "second-team" and one not in others]

    team = waiting.SecondTeam()
    team.hold(True)
    team.hold(True)
    (thread,) = alive()
    team.hold(False)
    thread.join(10)
    assert not alive()
