"""What this process may use of its machine, and how its threads wait for each other."""

from pathlib import Path

import pytest

from forebay_inference.engine import machine
from forebay_inference.engine.transformers import waits

ALWAYS_YIELD = {"OMP_WAIT_POLICY": "PASSIVE"}


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cgroup of a service, in a slice, on a machine of 64 CPUs."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(machine, "allowed_cpus", lambda: 64)
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path)
    monkeypatch.setattr(machine, "_OWN_CGROUP", tmp_path / "own")
    (tmp_path / "own").write_text("2:cpuacct:/other\n0::/some.slice/forebay.service\n")
    folder = tmp_path / "some.slice" / "forebay.service"
    folder.mkdir(parents=True)
    return folder


def test_the_smallest_limit_counts(service: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.usable_cpus() == 64
    (service / "cpu.max").write_text("max 100000\n")
    (service.parent / "cpu.max").write_text("350000 100000\n")
    assert machine.usable_cpus() == 4
    for value, threads in (("2", 2), ("3,2", 3), ("8", 4), ("0", 1), ("many", 4)):
        monkeypatch.setenv("OMP_NUM_THREADS", value)
        assert machine.usable_cpus() == threads
    (service.parents[1] / "own").unlink()
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert machine.usable_cpus() == 64


def test_memory_is_what_the_cgroups_leave(service: Path) -> None:
    free = machine.available_memory()
    for folder, limit in ((service, "max"), (service.parent, str(1 << 20))):
        (folder / "memory.max").write_text(limit)
        (folder / "memory.current").write_text("1000")
    assert machine.available_memory() == (1 << 20) - 1000 < free


def test_threads_spin_only_where_they_can_be_made_to_yield() -> None:
    assert waits(64, 64)["GOMP_SPINCOUNT"] == "10000"
    # libgomp lets them yield once it counts more threads than CPUs, of which there are then twice as many.
    assert waits(2, 64) == waits(256, 256) == ALWAYS_YIELD
