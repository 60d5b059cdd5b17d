"""The limits that services share: who was told what, and what is said of it."""

from typing import Any

import pytest

from forebay_contracts.nats.limits import Limits, Watch, differences
from forebay_contracts.wire.heartbeats import ApiInfo, WorkerInfo, WorkerStatus


def api(name: str, **limits: float) -> ApiInfo:
    return ApiInfo(id=name, version="1", started_at=0, heartbeat_at=0, model="m", limits=limits)


def worker(name: str, limits: dict[str, float] | None, model: str = "m") -> WorkerInfo:
    common: dict[str, Any] = {"version": "1", "started_at": 0, "heartbeat_at": 0, "engine": "simulated", "slots": 1}
    return WorkerInfo(id=name, model=model, status=WorkerStatus.READY, limits=limits, **common)


def test_two_that_were_told_differently_are_both_named() -> None:
    services = [api("a", max_queue_size=1_234_567), worker("w", {"max_queue_size": 100})]
    assert differences({"max_queue_size": 100}, {}, services) == [
        "MAX_QUEUE_SIZE is 100 on NATS; 100 is set for w; 1234567 is set for a"
    ]


def test_a_default_that_does_not_hold_is_named() -> None:
    services = [api("a", max_queue_size=500), *(worker(f"w{number}", {}) for number in range(5))]
    assert differences({"max_queue_size": 500}, {}, services) == [
        "MAX_QUEUE_SIZE is 500 on NATS; 500 is set for a; not set for w0, w1, w2 and 2 more (default 100)"
    ]


def test_a_limit_of_a_model_concerns_those_that_serve_it() -> None:
    services = [worker("w", {"ack_wait": 7}), worker("other", {"ack_wait": 9}, model="n"), worker("old", None)]
    assert differences({}, {"m": {"ack_wait": 7}, "n": {"ack_wait": 9}}, services) == []
    assert differences({}, {"m": {"ack_wait": 8}, "n": {"ack_wait": 9}}, services) == [
        "ACK_WAIT of m is 8 on NATS; 7 is set for w"
    ]


def test_the_account_may_have_less_than_a_default_of_bytes() -> None:
    assert differences({"answer_log_bytes": 4096}, {}, [api("a")]) == []


async def test_a_service_says_a_difference_once(caplog: pytest.LogCaptureFixture) -> None:
    found = [Limits({"ack_wait": 5}, {}, {"ack_wait": live}) for live in (5, 9, 9, 5, 9)]
    watch = Watch(lambda: answered(found.pop(0)))
    while found:
        await watch.look()
    assert [record.getMessage() for record in caplog.records] == [
        "[RequestQueue] limits: ACK_WAIT=5 is set here, and NATS has 9: another process was told so"
    ] * 2


async def answered(limits: Limits) -> Limits:
    return limits
