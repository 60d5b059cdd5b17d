"""The pages of the benchmarks are rendered from results alone."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import curves, report

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


def _part(**figures: Any) -> dict[str, Any]:
    return {"stamp": STAMP, "figures": figures}


def _overload() -> dict[str, Any]:
    one = {"offered_per_s": 320, "goodput_per_s": _spread(80), "accepted_p50_ms": _spread(300)}
    loads = {"4": one | {"accepted_p99_ms": _spread(400), "refused_p50_ms": _spread(2), "refused_p99_ms": _spread(9)}}
    return _part(capacity_per_s=80, loads=loads, goodput_at_4_to_peak=0.97)


def _overhead() -> dict[str, Any]:
    rates = {key: _spread(value) for key, value in (("requests_per_s", 1000), ("p50_ms", 2), ("p95_ms", 3))}
    ours = rates | {"p99_ms": _spread(4), "cpu_s_per_1000": {"api": _spread(0.5), "nats-server": _spread(0.2)}}
    floor = ours | {"forebay_to_this": {"requests_per_s": _spread(0.5), "p50_ms": _spread(2)}}
    loads = {clients: {"forebay": ours, "floor": floor} for clients in ("1", "64")}
    ceiling = {"wrk_requests_per_s": 9e4, "driver_requests_per_s": 8e4, "driver_streams_per_s": 7e4}
    return _part(whole=loads, streamed={"1": {"forebay": ours}}, ceiling=ceiling, missing={"LiteLLM": "not there"})


def _backlog() -> dict[str, Any]:
    def depth(memory: float) -> dict[str, Any]:
        times = {"ms": _spread(2), "empty_ms": _spread(2), "ratio": _spread(1)}
        return {"nats_rss_mb": memory, "publish": times, "pull": times}

    return _part(depths={"0": depth(20), "1000": depth(25), "10000": depth(70)})


def _tokens() -> dict[str, Any]:
    one = {"tokens_per_s": _spread(90), "first_ms": _spread(300), "between_ms": _spread(60)}
    seen = {"tokens_per_s": 89.0, "first_ms": 301.0, "between_ms": 61.0}
    bare = {"clients": 8, "pairs": 5, "ratio": _spread(0.98), "worker_cpu_to_bare": _spread(1.01)}
    aiperf = {"clients": 8, "requests": 32, "aiperf": seen, "own": seen, "own_to_aiperf": dict.fromkeys(seen, 1.0)}
    clients = {"8": {"forebay": one, "transformers serve": one | {"forebay_to_this": _spread(1.3)}}}
    weights = {"forebay": "bf16", "transformers serve": "bf16"}
    return _part(clients=clients, weights=weights, bare=bare, aiperf=aiperf, missing={})


def _served() -> dict[str, Any]:
    one = {"tokens_per_s": _spread(90), "first_ms": _spread(300), "between_ms": _spread(60)}
    ratios = {"tokens_per_s_to_alone": _spread(0.97), "first_ms_to_alone": _spread(1.1)}
    clients = {"2: 2,000 tokens": {"forebay": one, "alone": one} | ratios}
    return _part(engine="vllm", prompts="long", rounds=5, clients=clients)


def _loadgen() -> dict[str, Any]:
    fields = ("requests_per_s", "first_ms", "between_ms")
    tools = {tool: {field: _spread(25) for field in fields} for tool in ("AIPerf", "driver")}
    ours = tools | {"driver_to_aiperf": {field: _spread(1.01) for field in fields}}
    bare = ours | {"forebay_to_this": {field: _spread(0.95) for field in fields}}
    ceiling = {"clients": 64, "aiperf_requests_per_s": 420.0, "driver_requests_per_s": 56_000.0}
    clients = {"16": {"forebay": ours, "bare HTTP": bare}}
    return _part(rounds=5, tokens=20, delay_ms=25, clients=clients, ceiling=ceiling, missing={"LiteLLM": "not there"})


def _bodies() -> dict[str, Any]:
    one = {key: _spread(value) for key, value in (("requests_per_s", 230), ("p50_ms", 60), ("p99_ms", 120))}
    ours = one | {"cpu_ms": {"api": _spread(3)}, "pause_ms": {"api": _spread(30), "worker": _spread(20)}}
    peer = one | {"cpu_ms": {"http": _spread(2)}, "forebay_to_this": _spread(0.6)}
    return _part(clients=16, sizes_kb={"400": {"forebay": ours, "bare HTTP": peer}}, missing={})


def _scale() -> dict[str, Any]:
    def curve(key: str, values: dict[str, float], *processes: str) -> dict[str, Any]:
        return {
            count: {key: value, "rss_mb": {process: 20 + float(count) / 50 for process in processes}}
            for count, value in values.items()
        }

    three = ("nats-server", "api", "worker")
    return _part(
        workers=curve("requests_per_s", {"1": 160, "2": 320, "4": 640, "8": 700}, *three),
        streams=curve("tokens_per_s", {"1": 4, "100": 400, "1000": 4000}, *three),
        api_processes=curve("requests_per_s", {"1": 1500, "2": 1500, "3": 1500}, *three),
    )


def _goals() -> dict[str, Any]:
    wire = dict.fromkeys(("in_msgs", "out_msgs", "in_bytes", "out_bytes"), 9.0)
    points = [(1000.0 * number, {"uss": 40 + 20.0 * number}) for number in range(6)]
    return _part(
        first_token_at_half_load={"p99": _spread(10), "bare_http": {"p99": _spread(2)}},
        relayed_by_1_worker={"tokens_per_s": _spread(4e4), "tokens_per_cpu_second_of_the_api": _spread(4e4)},
        refusals={"p99": _spread(5), "refusals_per_s": _spread(1000)},
        waiting_memory={"points": points, "bytes_each_less_body": 19_900},
        wire={"whole": wire},
    )


def _observability() -> dict[str, Any]:
    engines = {
        "10": {"requests": _spread(0.99), "cpu": _spread(1.01)},
        "0": {"requests": _spread(0.9), "cpu": _spread(1.1)},
    }
    turns = {"clients": 16, "blocks": 5, "pairs": 20, "turn_s": 0.2, "scrape_s": 5.0}
    return _part(on=["metrics", "logs"], silent=False, sampled=0.01, by_token_ms=engines, **turns)


PARTS = {
    "overload": _overload,
    "overhead": _overhead,
    "backlog": _backlog,
    "tokens": _tokens,
    "served-long": _served,
    "bodies": _bodies,
    "loadgen": _loadgen,
    "scale": _scale,
    "goals": _goals,
    "observability": _observability,
}


def _results(folder: Path) -> Path:
    for name, make in PARTS.items():
        (folder / f"{name}.json").write_text(json.dumps(make()))
    return folder


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


def test_large_bodies_and_their_goal(tmp_path: Path) -> None:
    page = report.benchmarks_page(report.load(_results(tmp_path)))
    assert "| 400 | forebay | 230 (229 to 231) | 60.0 (59.0 to 61.0) | 120.0 (119.0 to 121.0) | api 3.00 |" in page
    assert "| requests/s with bodies of 400 KB, 16 clients | ≥ 200/s, event loops pause ≤ 50 ms | 230 (229" in page


def test_a_served_engine_beside_itself_alone(tmp_path: Path) -> None:
    page = report.benchmarks_page(report.load(_results(tmp_path)))
    assert "## vLLM through Forebay and alone: longer prompts" in page
    assert "| 2: 2,000 tokens | 90.0 (89.0 to 91.0) | 90.0 (89.0 to 91.0) | 0.97 (-0.03 to 1.97) | 300.0" in page


def test_what_aiperf_and_the_driver_say_stands_side_by_side(tmp_path: Path) -> None:
    page = report.benchmarks_page(report.load(_results(tmp_path)))
    assert "| 16 | forebay | AIPerf | 25.0 (24.0 to 26.0) |" in page
    assert "| 16 | forebay | driver | 25.0 (24.0 to 26.0) |" in page
    assert "| 16 | bare HTTP | 1.01 (0.01 to 2.01) | 1.01 (0.01 to 2.01) | 1.01 (0.01 to 2.01) | 0.95" in page
    assert "AIPerf takes 420 streams/s, the driver 56,000" in page
    assert "Not measured: LiteLLM: not there" in page
    assert "| tokens/s | 89.00 | 89.00 | 1.00 |" in page


def test_observability_has_its_goal_where_a_token_takes_time(tmp_path: Path) -> None:
    page = report.benchmarks_page(report.load(_results(tmp_path)))
    assert (
        "| requests/s with all observability ÷ without, 10 ms a token | ≥ 0.95 | 0.990 (-0.010 to 1.990) | met |"
        in page
    )
    assert "| 0 ms | 0.900 (-0.100 to 1.900) | 1.100 (0.100 to 2.100) |" in page


def test_each_curve_has_its_order(tmp_path: Path) -> None:
    parts = report.load(_results(tmp_path))
    backlog = report.benchmarks_page(parts)
    assert "publish by what is queued: n^0.00, O(1)" in backlog
    assert "nats-server by 1,000 queued: 5 MB (its growth n^1.00, O(n))" in backlog
    scale = report.scale_page(parts)
    assert "requests/s by workers: n^1.00, O(n); up to 4 workers" in scale
    assert "tokens/s by open streams: n^1.00, O(n); nats-server by 1,000 open streams: 20 MB" in scale
    assert "requests/s by api processes: n^0.00, O(1); api: 7 MB a process where there are 3" in scale
    assert "20 MB (its growth n^1.00, O(n))" in scale


def test_orders_and_knees() -> None:
    assert curves.order(0.05) == "O(1)"
    assert curves.order(0.9) == "O(n)"
    assert curves.order(0.7) == "O(n^0.7)"
    assert curves.order(2) == "O(n^2.0)"
    assert curves.exponent([(0, 1), (10, 100)]) is None
    assert curves.exponent([(1, 3), (10, 300), (100, 30_000)]) == pytest.approx(2)
    assert curves.knee([(1, 10), (2, 20), (4, 40), (8, 41)]) == 4
    assert curves.knee([(1, 10), (2, 20), (4, 40)]) is None


def test_plots_name_their_commit_and_are_the_same_each_time(tmp_path: Path) -> None:
    from benchmarks import plots

    parts = report.load(_results(tmp_path))
    drawn = []
    for name in ("once", "again"):
        (tmp_path / name).mkdir()
        plots.draw(parts, tmp_path / name)
        drawn.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    once, again = drawn
    assert once == again
    assert once.keys() == {f"bench-{name}.svg" for name in plots.PLOTS}
    assert all(b"commit abc1234567 (a quick run)" in data for data in once.values())
    page = report.benchmarks_page(parts) + report.scale_page(parts)
    assert all(f"(images/{name})" in page for name in once)
