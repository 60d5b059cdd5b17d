"""A broker that is killed and forgets its deliveries costs nobody an answer; `make soak ARGS=broker` tries it often."""

from pathlib import Path

import pytest

from support import killed_broker


@pytest.mark.timeout(240)
@pytest.mark.parametrize("workers", [1, 2])
async def test_nobody_loses_an_answer_and_all_that_is_told_of_it_agrees(workers: int, tmp_path: Path) -> None:
    await killed_broker.one_server(10, workers, tmp_path, seed=workers)


@pytest.mark.timeout(240)
async def test_nor_with_three_servers(tmp_path: Path) -> None:
    await killed_broker.three_servers(2, 2, tmp_path, seed=1)
