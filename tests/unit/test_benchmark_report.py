"""The pages of the benchmarks are rendered from results alone."""

import json
from pathlib import Path
from typing import Any

from benchmarks import report

STAMP = {
    "commit": "abc1234567",
    "at": "2026-01-01 00:00 UTC",
    "cores": 2,
    "cpu": "a CPU",
    "load_before": 0.1,
    "versions": {"python": "3.11"},
    "took_s": 10,
    "quick": True,
}


def _spread(value: float) -> dict[str, float]:
    return {"median": value, "min": value - 1, "max": value + 1}


def _overload() -> dict[str, Any]:
    one = {"offered_per_s": 320, "goodput_per_s": _spread(80), "accepted_p50_ms": _spread(300)}
    loads = {"4": one | {"accepted_p99_ms": _spread(400), "refused_p50_ms": _spread(2), "refused_p99_ms": _spread(9)}}
    return {"stamp": STAMP, "figures": {"capacity_per_s": 80, "loads": loads, "goodput_at_4_to_peak": 0.97}}


def test_a_result_becomes_rows_with_its_stamp(tmp_path: Path) -> None:
    (tmp_path / "overload.json").write_text(json.dumps(_overload()))
    page = report.benchmarks_page(report.load(tmp_path))
    assert "| 4× | 320 | 80.0 (79.0 to 81.0) |" in page  # noqa: RUF001
    assert "| goodput at 4× ÷ peak | ≥ 0.95 | 0.97 |" in page  # noqa: RUF001
    assert "Commit abc1234567" in page
    assert "A quick run" in page


def test_without_results_there_is_no_figure(tmp_path: Path) -> None:
    assert "|" not in report.benchmarks_page(report.load(tmp_path))
    assert "|" not in report.scale_page(report.load(tmp_path))
