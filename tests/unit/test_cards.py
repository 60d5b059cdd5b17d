from pathlib import Path

import pytest

from forebay_cli.local.cards import card_of_worker, visible_cards

GPUS = """GPU 0: NVIDIA L4 (UUID: GPU-1a2b-3c)
GPU 1: NVIDIA L4 (UUID: GPU-4d5e-6f)
"""
MIG = """GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1a2b-3c)
  MIG 3g.40gb     Device  0: (UUID: MIG-7a)
  MIG 3g.40gb     Device  1: (UUID: MIG-8b)
"""


@pytest.mark.parametrize(
    ("named", "cards"), [("0,2", ["0", "2"]), ("", []), ("-1", []), ("GPU-1a, MIG-7a", ["GPU-1a", "MIG-7a"])]
)
def test_the_environment_says_which_cards_are_visible(named: str, cards: list[str]) -> None:
    assert visible_cards({"CUDA_VISIBLE_DEVICES": named}) == cards


@pytest.mark.parametrize(
    ("listed", "cards"), [(GPUS, ["GPU-1a2b-3c", "GPU-4d5e-6f"]), (MIG, ["MIG-7a", "MIG-8b"]), ("No devices\n", [])]
)
def test_else_the_driver_lists_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: str, cards: list[str]
) -> None:
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\ncat <<'EOF'\n{listed}EOF\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert visible_cards({}) == cards
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    assert visible_cards({}) == []


def test_workers_take_the_cards_in_turn() -> None:
    assert [card_of_worker(number, ["a", "b"]) for number in (1, 2, 3)] == [
        {"CUDA_VISIBLE_DEVICES": "a"},
        {"CUDA_VISIBLE_DEVICES": "b"},
        {"CUDA_VISIBLE_DEVICES": "a"},
    ]
    assert card_of_worker(2, ["a"]) == card_of_worker(1, []) == {}
