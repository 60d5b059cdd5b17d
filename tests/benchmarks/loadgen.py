"""AIPerf, a load generator for LLM servers, beside our own driver on the same load: does the driver tell the truth?

    python tests/benchmarks/loadgen.py [--quick]

Streams of 20 tokens, 25 ms apart as the simulated engine makes them, through Forebay, the engine behind bare HTTP and
LiteLLM, in turns. In each turn AIPerf has the load and then the driver, or the other way round: so many requests, each
client asking again as soon as it is answered. What they report is compared, and Forebay with the others by AIPerf's
figures alone. A last turn against prepared bytes shows what AIPerf itself can do at most: where that is near, it has
measured itself.
"""

import asyncio
import contextlib
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import systems
from benchmarks.ceiling import canned
from benchmarks.common import MODEL, Background, Unavailable, drive, log, part_main, peer_python, ratios, spread
from benchmarks.systems import System

BUDGET_S = 240
TOKENS, DELAY_MS = 20, 25
WHO = {"forebay": (16, 64), "bare HTTP": (16, 64), "LiteLLM": (16,)}
"""With how many clients each is measured. LiteLLM has fewer answers a second than 64 clients would ask for."""
FIELDS = ("requests_per_s", "first_ms", "between_ms")
LIMITS = {"max_concurrent_requests": 64, "max_queue_size": 1000}
AIPERF_TIMEOUT_S = 120


async def aiperf(
    url: str, model: str, texts: Sequence[str], loads: Mapping[int, int], tokens: int, warm_up: int = 0, **extra: Any
) -> dict[int, dict[str, float]]:
    """What AIPerf reports of each load, that is of so many clients so many requests; they ask `texts` in turn.

    `warm_up` requests at once come before them and do not count: they open the connections, as the driver does before
    its load begins. `extra` are fields of each request.

    Raises:
        Unavailable: AIPerf is not installed.
        RuntimeError: it failed, or not every request was answered.
    """
    python = peer_python("aiperf")
    with tempfile.TemporaryDirectory(prefix="forebay-bench-") as folder:
        endpoint = {"url": f"{url}/v1/chat/completions", "type": "chat", "streaming": True, "useServerTokenCount": True}
        records = [{"text": text, "output_length": tokens} for text in texts]
        benchmark = {
            "model": model,
            "endpoint": endpoint | {"timeout": AIPERF_TIMEOUT_S, "extra": extra},
            "dataset": {"type": "file", "format": "single_turn", "sampling": "sequential", "records": records},
            "tokenizer": {"name": str(await systems.default_model())},
            "phases": [
                {"name": name, "kind": kind, "type": "concurrency", "concurrency": clients, "requests": requests}
                for name, kind, clients, requests in (
                    *((("warmup", "warmup", warm_up, warm_up),) if warm_up else ()),
                    *((f"c{clients}", "profiling", clients, requests) for clients, requests in loads.items()),
                )
            ],
            "artifacts": {"dir": f"{folder}/found", "summary": ["json"], "records": False},
            "runtime": {"ui": "none", "workers": 1, "recordProcessors": 1},
            "gpuTelemetry": {"enabled": False},
            "serverMetrics": {"enabled": False},
        }
        config = Path(folder) / "aiperf.yaml"
        config.write_text(json.dumps({"schemaVersion": "2.0", "benchmark": benchmark}))  # JSON is YAML, too
        command = [str(Path(python).parent / "aiperf"), "profile", "--config", str(config)]
        with Background("AIPerf", command, {"PYTHONPATH": ""}) as tool:
            await asyncio.to_thread(tool.wait, AIPERF_TIMEOUT_S)
        found = {}
        for clients, requests in loads.items():
            # Each load has a folder of its own, unless it is the only one.
            place = Path(folder) / "found" / (f"phases/c{clients}" if len(loads) > 1 else ".")
            report = json.loads((place / "profile_export_aiperf.json").read_text())
            if report["request_count"]["avg"] != requests:
                raise RuntimeError(f"AIPerf had {report['request_count']['avg']} answers and not {requests}: {report}")
            found[clients] = {
                "requests_per_s": report["request_throughput"]["avg"],
                "tokens_per_s": report["output_token_throughput"]["avg"],
                "first_ms": report["time_to_first_token"]["p50"],
                "between_ms": report["inter_token_latency"]["p50"],
            }
    return found


async def both(system: System, clients: Sequence[int], waves: int, driver_first: bool) -> dict[int, dict[str, Any]]:
    """One turn of a system: by clients, the figures of both for `waves` requests a client."""
    loads = {count: waves * count for count in clients}
    found: dict[int, dict[str, Any]] = {count: {} for count in clients}
    system.go_on()
    for name in ("driver", "AIPerf") if driver_first else ("AIPerf", "driver"):
        if name == "AIPerf":
            text = f"[[tokens={TOKENS} delay_ms={DELAY_MS}]]"
            figures = await aiperf(f"http://127.0.0.1:{system.port}", MODEL, [text], loads, TOKENS, max(loads))
            for count, one in figures.items():
                found[count][name] = one
            continue
        for count, requests in loads.items():
            row = await drive(system.port, count, 0, requests=requests, stream=True, tokens=TOKENS, delay_ms=DELAY_MS)
            if row["not_200"]:
                raise RuntimeError(f"{system.name}: {row['not_200']} answers were not 200")
            found[count][name] = {
                "requests_per_s": row["requests_per_s"],
                "tokens_per_s": row["tokens_per_s"],
                "first_ms": row["first_token_ms"]["p50"],
                "between_ms": row["between_ms"]["p50"],
            }
    system.hold()
    return found


def summary(turns: Sequence[dict[str, Any]], ours: Sequence[dict[str, Any]] | None) -> dict[str, Any]:
    """Spreads of both, the driver's figures divided by AIPerf's, and by AIPerf's Forebay's divided by these."""

    def column(name: str, field: str, rows: Sequence[dict[str, Any]] = turns) -> list[float]:
        return [row[name][field] for row in rows]

    found: dict[str, Any] = {
        name: {field: spread(column(name, field)) for field in FIELDS} for name in ("AIPerf", "driver")
    }
    found["driver_to_aiperf"] = {field: ratios(column("driver", field), column("AIPerf", field)) for field in FIELDS}
    if ours is not None:
        found["forebay_to_this"] = {
            field: ratios(column("AIPerf", field, ours), column("AIPerf", field)) for field in FIELDS
        }
    return found


async def ceiling(clients: int, requests: int) -> dict[str, Any]:
    """What both can do at most."""
    with canned(TOKENS) as port:
        tool = await aiperf(f"http://127.0.0.1:{port}", MODEL, ["Say something."], {clients: requests}, TOKENS, clients)
        driver = await drive(port, clients, 0, requests=20 * requests, stream=True, tokens=TOKENS)
    return {
        "clients": clients,
        "aiperf_requests_per_s": round(tool[clients]["requests_per_s"], 1),
        "driver_requests_per_s": driver["requests_per_s"],
    }


async def measure(quick: bool) -> dict[str, Any]:
    """All systems in turns, then the ceiling."""
    rounds, waves = (1, 2) if quick else (5, 3)
    peer_python("aiperf")
    found: dict[str, Any] = {"rounds": rounds, "tokens": TOKENS, "delay_ms": DELAY_MS, "clients": {}, "missing": {}}
    turns: dict[str, list[dict[int, dict[str, Any]]]] = {}
    async with contextlib.AsyncExitStack() as stack:
        ours, running, _ = await stack.enter_async_context(systems.forebay(log_level="INFO", **LIMITS))
        started = {"forebay": ours}
        for name in WHO:
            if name == "forebay":
                continue
            try:
                started[name] = stack.enter_context(systems.ALL[name]())
            except Unavailable as exc:
                found["missing"][name] = str(exc)
                log(f"without {name}: {exc}")
        for name, system in started.items():
            turns[name] = []
            await drive(system.port, 16, 0, requests=32, stream=True, tokens=TOKENS)
            if name != "forebay":
                system.hold()
        for number in range(rounds):
            for name in sorted(turns, reverse=bool(number % 2)):
                try:
                    turns[name].append(await both(started[name], WHO[name], waves, driver_first=bool(number % 2)))
                except RuntimeError as exc:
                    if name == "forebay":
                        raise
                    found["missing"][name] = str(exc)[-500:]
                    log(f"from here on without {name}: {exc}")
                    started[name].hold()
                    turns.pop(name)
                if name == "forebay":
                    await running.idle()
            shown = {
                f"{name}, {clients}": {tool: round(figures["requests_per_s"]) for tool, figures in one.items()}
                for name, rows in turns.items()
                for clients, one in rows[-1].items()
            }
            log(f"round {number + 1} of {rounds}, requests/s: {shown}")
    for clients in WHO["forebay"]:
        found["clients"][str(clients)] = {
            name: summary(
                [row[clients] for row in rows],
                None if name == "forebay" else [row[clients] for row in turns["forebay"]],
            )
            for name, rows in turns.items()
            if clients in WHO[name]
        }
    found["ceiling"] = await ceiling(64, 64 if quick else 640)
    log(f"ceiling: {found['ceiling']}")
    return found


if __name__ == "__main__":
    sys.exit(part_main("loadgen", BUDGET_S, measure, __doc__ or ""))
