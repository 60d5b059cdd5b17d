"""Stored answers outlive whatever is killed: a short run of `stored_soak.py`."""

import pytest

from faults.stored_soak import soak


@pytest.mark.timeout(180)
async def test_every_answer_is_whole_and_exact_whatever_is_killed() -> None:
    found = await soak(seconds=12, clients=30, pause_s=2)
    assert (found["lost"], found["wrong"]) == ([], []), found
    assert found["responses"] >= 30
    assert found["taken_up"] >= 10
    assert set(found["killed"]) == {"api", "worker", "nats"}
