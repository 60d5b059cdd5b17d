# ruff: noqa: E501, RUF001 -- prose
"""`make bench-report`: docs/benchmarks.md, docs/scale.md and their plots from the JSON of the results.

    python tests/benchmarks/report.py [--results DIR] [--docs DIR]

No figure on those pages is written by hand.
"""

import argparse
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.curves import growth, linear
from benchmarks.page import Parts, cell, origin, plot, table
from benchmarks.scale_page import scale_page
from benchmarks.tokens_page import served, tokens

HERE = Path(__file__).parent


def overhead(part: dict[str, Any]) -> str:
    """The path beside the floor and the peers."""
    figures = part["figures"]
    text = [f"## Overhead of the path\n\n{origin(part)}\n\n{plot('overhead', 'Requests/s and p50 by clients', part)}\n"]
    for mode, title in (("whole", "Not streamed, 5 tokens, load by wrk"), ("streamed", "Streamed, 20 tokens")):
        for clients, systems in figures[mode].items():
            rows = []
            for name, one in systems.items():
                ratio = one.get("forebay_to_this", {})
                cpu = ", ".join(f"{process} {value['median']:.2f}" for process, value in one["cpu_s_per_1000"].items())
                values = [cell(one["requests_per_s"], 0), *(cell(one[f"p{share}_ms"]) for share in (50, 95, 99)), cpu]
                values += [cell(ratio[key], 2) if ratio else "" for key in ("requests_per_s", "p50_ms")]
                rows.append([name, *values])
            head = ["", "requests/s", "p50 ms", "p95 ms", "p99 ms", "CPU s a 1,000", "Forebay's requests/s ÷", "p50 ÷"]
            text.append(f"\n### {title}: {clients} clients\n\n{table(head, rows)}")
    ceiling = figures["ceiling"]
    text.append(
        f"\nThe load generators alone, against a server with prepared answers: wrk {ceiling['wrk_requests_per_s']:,.0f} requests/s, "
        f"the driver {ceiling['driver_requests_per_s']:,.0f} requests/s and {ceiling['driver_streams_per_s']:,.0f} streams/s."
    )
    text += [f"\nNot measured: {name}: {reason}" for name, reason in figures["missing"].items()]
    return "\n".join(text)


def overload(part: dict[str, Any]) -> str:
    """Goodput under more load than there is capacity."""
    rows = []
    for load, one in part["figures"]["loads"].items():
        refused = [cell(one[key]) if key in one else "" for key in ("refused_p50_ms", "refused_p99_ms")]
        accepted = [cell(one["accepted_p50_ms"], 0), cell(one["accepted_p99_ms"], 0)]
        rows.append([f"{load}×", f"{one['offered_per_s']:.0f}", cell(one["goodput_per_s"]), *accepted, *refused])
    head = ["load", "offered/s", "goodput/s", "accepted p50 ms", "p99 ms", "refused p50 ms", "p99 ms"]
    return (
        f"## Overload\n\n{origin(part)}\n\n{plot('overload', 'Goodput by offered load', part)}\n\n"
        f"{table(head, rows)}\n\n"
        f"Goodput at 4× ÷ peak: {part['figures']['goodput_at_4_to_peak']}."
    )


def backlog(part: dict[str, Any]) -> str:
    """Admission and pull by depth of the queue."""
    rows = []
    depths = [(float(depth), one) for depth, one in part["figures"]["depths"].items()]
    for depth, one in depths:
        pairs = [
            text for name in ("publish", "pull") for text in (cell(one[name]["ms"], 2), cell(one[name]["ratio"], 2))
        ]
        rows.append([f"{depth:,.0f}", *pairs, f"{one['nats_rss_mb']:.0f}"])
    head = ["queued", "publish ms", "÷ empty queue's", "pull ms", "÷ empty queue's", "nats-server MB"]
    lines = [
        growth(f"{name} by what is queued", [(depth, one[name]["ms"]["median"]) for depth, one in depths])
        for name in ("publish", "pull")
    ]
    lines.append(
        linear("nats-server by 1,000 queued", [(depth, one["nats_rss_mb"]) for depth, one in depths], 1000, "MB")
    )
    return (
        f"## Backlog\n\n{origin(part)}\n\n{plot('backlog', 'Publish, pull and memory by queued requests', part)}\n\n"
        f"{table(head, rows)}\n\n{'; '.join(lines)}."
    )


def goals(parts: Parts) -> str:
    """The measures that have a goal, as far as their parts were run; a median decides."""
    quick = [name for name, part in parts.items() if part["stamp"]["quick"]]
    note = f"\n\nQuick runs, which need a full run: {', '.join(quick)}." if quick else ""
    rows: list[list[str]] = []

    def row(measure: str, goal: str, measured: str, met: bool) -> None:
        rows.append([measure, goal, measured, "met" if met else "missed"])

    if "overhead" in parts:
        whole = parts["overhead"]["figures"]["whole"]
        ratio, own = whole["1"]["floor"]["forebay_to_this"]["p50_ms"], whole["1"]["forebay"]["p50_ms"]
        row(
            "p50, 1 client, not streamed",
            "≤ 2.5× the floor, ≤ 3 ms",
            f"{cell(ratio, 2)}×, {cell(own, 2)} ms",
            ratio["median"] <= 2.5 and own["median"] <= 3,
        )
        share, rate = (
            whole["64"]["floor"]["forebay_to_this"]["requests_per_s"],
            whole["64"]["forebay"]["requests_per_s"],
        )
        row(
            "requests/s, 64 clients",
            "≥ 0.25 of the floor's, ≥ 970/s",
            f"{cell(share, 2)}, {cell(rate, 0)}/s",
            share["median"] >= 0.25 and rate["median"] >= 970,
        )
        if "LiteLLM" in whole["64"]:
            times = whole["64"]["LiteLLM"]["forebay_to_this"]["requests_per_s"]
            row("requests/s ÷ LiteLLM's, 64 clients", "≥ 3", cell(times, 1), times["median"] >= 3)
    if "goals" in parts:
        one = parts["goals"]["figures"]
        first, bare = one["first_token_at_half_load"]["p99"], one["first_token_at_half_load"]["bare_http"]["p99"]
        row(
            "first token, 64 clients, half load, p99",
            "≤ 15 ms",
            f"{cell(first)} ms; the engine behind HTTP alone: {cell(bare)} ms",
            first["median"] <= 15,
        )
        relayed = one["relayed_by_1_worker"]["tokens_per_s"]
        row("relayed tokens/s, one api process", "≥ 30,000", cell(relayed, 0), relayed["median"] >= 30_000)
        refused, rate = one["refusals"]["p99"], one["refusals"]["refusals_per_s"]
        row(
            "refusal, p99",
            "≤ 10 ms at 1,000/s",
            f"{cell(refused)} ms at {cell(rate, 0)}/s",
            refused["median"] <= 10 and rate["median"] >= 1000,
        )
        each = one["waiting_memory"]["bytes_each_less_body"]
        row("memory of a waiting request, without its body", "≤ 20 KB", f"{each / 1000:.1f} KB", each <= 20_000)
    if "overload" in parts:
        kept = parts["overload"]["figures"]["goodput_at_4_to_peak"]
        row("goodput at 4× ÷ peak", "≥ 0.95", str(kept), kept >= 0.95)
    if "backlog" in parts:
        depth, last = list(parts["backlog"]["figures"]["depths"].items())[-1]
        publish, pull = last["publish"]["ratio"], last["pull"]["ratio"]
        row(
            f"{int(depth):,} queued ÷ empty queue",
            "≤ 1.2 (at 100,000)",
            f"publish {cell(publish, 2)}, pull {cell(pull, 2)}",
            int(depth) >= 100_000 and max(publish["median"], pull["median"]) <= 1.2,
        )
    if "tokens" in parts:
        ratio = parts["tokens"]["figures"]["bare"]["ratio"]
        row("the model's tokens/s ÷ bare engine, 8 clients", "≥ 0.97", cell(ratio, 3), ratio["median"] >= 0.97)
    if "bodies" in parts:
        ours = parts["bodies"]["figures"]["sizes_kb"]["400"]["forebay"]
        rate, longest = ours["requests_per_s"], max(wait["median"] for wait in ours["pause_ms"].values())
        row(
            "requests/s with bodies of 400 KB, 16 clients",
            "≥ 200/s, event loops pause ≤ 50 ms",
            f"{cell(rate, 0)}/s, {longest:.0f} ms",
            rate["median"] >= 200 and longest <= 50,
        )
    if "observability" in parts:
        ratio = parts["observability"]["figures"]["by_token_ms"]["10"]["requests"]
        row(
            "requests/s with all observability ÷ without, 10 ms a token",
            "≥ 0.95",
            cell(ratio, 3),
            ratio["median"] >= 0.95,
        )
    return f"## Goals\n\n{table(['measure', 'goal on 2 cores', 'measured', ''], rows)}{note}"


def loadgen(part: dict[str, Any]) -> str:
    """AIPerf beside the driver."""
    figures, ceiling = part["figures"], part["figures"]["ceiling"]
    rows, ratios = [], []
    for clients, systems in figures["clients"].items():
        for name, one in systems.items():
            for tool in ("AIPerf", "driver"):
                values = [cell(one[tool][key]) for key in ("requests_per_s", "first_ms", "between_ms")]
                rows.append([clients, name, tool, *values])
            pairs = [one["driver_to_aiperf"], one.get("forebay_to_this", {})]
            values = [
                cell(ratio[key], 2) if ratio else ""
                for ratio in pairs
                for key in ("requests_per_s", "first_ms", "between_ms")
            ]
            ratios.append([clients, name, *values])
    head = ["clients", "", "reported by", "requests/s", "first token p50 ms", "between tokens p50 ms"]
    ratio_head = ["clients", "", "driver ÷ AIPerf: requests/s", "first token", "between tokens"]
    ratio_head += ["Forebay ÷ this, by AIPerf: requests/s", "first token", "between tokens"]
    text = (
        f"## AIPerf and the driver\n\n{origin(part)}\n\nStreams of {figures['tokens']} tokens, one every "
        f"{figures['delay_ms']} ms, {figures['rounds']} turns each. This part checks the driver of the other parts. "
        f"Both send the same load, so a ratio near 1 confirms the driver.\n\n{table(head, rows)}\n\n{table(ratio_head, ratios)}\n\n"
        f"Against a server with prepared answers, {ceiling['clients']} clients, AIPerf takes {ceiling['aiperf_requests_per_s']:,.0f} "
        f"streams/s, the driver {ceiling['driver_requests_per_s']:,.0f}. If AIPerf reports a rate "
        "near its own maximum, AIPerf is the limit. If AIPerf sees a wait for the first token with every system, and the "
        "driver does not, AIPerf causes it."
    )
    return text + "".join(f"\n\nNot measured: {name}: {reason}" for name, reason in figures["missing"].items())


def bodies(part: dict[str, Any]) -> str:
    """Large request bodies."""
    figures, rows = part["figures"], []
    for size_kb, systems in figures["sizes_kb"].items():
        for name, one in systems.items():
            cpu = ", ".join(f"{process} {value['median']:.2f}" for process, value in one["cpu_ms"].items())
            waits = ", ".join(f"{process} {value['median']:.0f}" for process, value in one.get("pause_ms", {}).items())
            ratio = cell(one["forebay_to_this"], 2) if "forebay_to_this" in one else ""
            rates = [cell(one["requests_per_s"], 0), cell(one["p50_ms"]), cell(one["p99_ms"])]
            rows.append([size_kb, name, *rates, cpu, waits, ratio])
    head = ["KB", "", "requests/s", "p50 ms", "p99 ms", "CPU ms a request", "health after ms", "Forebay's requests/s ÷"]
    return (
        f"## Large bodies\n\n{origin(part)}\n\nConversations of messages of 2 KB, {figures['clients']} clients, not streamed, "
        f'5 tokens. "Health after" is the longest wait for the health of a service in turns of their own: no pause of '
        f"its event loop was longer.\n\n{table(head, rows)}"
    ) + "".join(f"\n\nNot measured: {name}: {reason}" for name, reason in figures["missing"].items())


def cold(part: dict[str, Any]) -> str:
    """Start, idle and size."""
    one = part["figures"]
    rows = [
        [each["process"], f"{each['cpu_percent']:.2f} %", f"{each['rss']:,.0f}", f"{each['uss']:,.0f}"]
        for each in one["idle"]
    ]
    return (
        f"## Cold and idle\n\n{origin(part)}\n\n`forebay up` with a fetched model is ready after {one['ready_s']} "
        f"s. A first answer of 4 tokens is there after {one['first_answer_s']} s. The virtual environment has "
        f"{one['venv_mb']:,.0f} MB, the model {one['model_mb']:,.0f} MB. The table shows the processes while idle for "
        f"{one['idle_seconds']} s:\n\n{table(['process', 'CPU of a core', 'resident MB', 'own MB'], rows)}"
    )


def observability(part: dict[str, Any]) -> str:
    """What observability costs."""
    one = part["figures"]
    rows = [
        [f"{token_ms} ms", *(cell(engine[key], 3) for key in ("requests", "cpu"))]
        for token_ms, engine in one["by_token_ms"].items()
    ]
    head = ["a token takes", "requests/s, on ÷ off", "CPU time a request of api and worker, on ÷ off"]
    return (
        f"## Cost of all observability{', against silence' if one['silent'] else ''}\n\n{origin(part)}\n\n"
        f"{', '.join(one['on'])} on (JSON lines, {one['sampled']:.0%} of the requests traced, a scrape every "
        f"{one['scrape_s']:g} s), against no metrics, no traces and "
        f"{'no lines below warnings' if one['silent'] else 'text lines'}; {one['clients']} clients, {one['blocks']} "
        f"pairs of systems that took {one['pairs']} turns of {one['turn_s']:g} s each.\n\n{table(head, rows)}"
    )


PAGE = {
    "overhead": overhead,
    "overload": overload,
    "backlog": backlog,
    "tokens": tokens,
    "tokens-nf4": tokens,
    "tokens-busy": tokens,
    "served": served,
    "served-long": served,
    "served-llamacpp": served,
    "served-llamacpp-long": served,
    "served-transformers": served,
    "served-transformers-long": served,
    "bodies": bodies,
    "loadgen": loadgen,
    "cold": cold,
    "observability": observability,
    "observability-silent": observability,
}
"""The parts of docs/benchmarks.md in their order; `scale` and `fifty_workers` are on docs/scale.md."""


def benchmarks_page(parts: Parts) -> str:
    """docs/benchmarks.md."""
    intro = (
        "# Benchmarks\n\n`make bench-report` writes this page from the JSON files of `make bench`. No figure is written by "
        "hand. A cell has the median, and in brackets the minimum and the maximum. A ratio compares turns of the same "
        "round. [The README of the scripts](../tests/benchmarks/README.md) says how each part measures.\n"
    )
    made = [goals(parts)] if parts else []
    made += [one(parts[name]) for name, one in PAGE.items() if name in parts]
    return "\n\n".join([intro.rstrip(), *made]) + "\n"


def readme(parts: Parts, path: Path) -> None:
    """Put the goals, and the peers' requests/s, between the markers of README.md."""
    if not path.is_file():
        return
    text = path.read_text()
    begin, end = "<!-- goals -->", "<!-- /goals -->"
    if begin not in text or end not in text or not parts:
        return
    made = goals(parts).partition("\n\n")[2]
    if "overhead" in parts:
        peers = parts["overhead"]["figures"]["whole"]["64"]
        rows = [[name, cell(one["requests_per_s"], 0)] for name, one in peers.items()]
        made += f"\n\n{table(['64 clients, not streamed', 'requests/s'], rows)}"
    head, rest = text.split(begin, 1)
    path.write_text(f"{head}{begin}\n{made}\n{end}{rest.split(end, 1)[1]}")


def load(folder: Path) -> Parts:
    """All results by the name of their part."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def main() -> int:
    """Write the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--docs", type=Path, default=HERE.parents[1] / "docs")
    options = parser.parse_args()
    parts = load(options.results)
    (options.docs / "images").mkdir(parents=True, exist_ok=True)
    if find_spec("matplotlib"):
        from benchmarks import plots

        plots.draw(parts, options.docs / "images")
    else:
        print("the plots stay as they are: they need the extra `bench`", file=sys.stderr)
    (options.docs / "benchmarks.md").write_text(benchmarks_page(parts))
    (options.docs / "scale.md").write_text(scale_page(parts))
    readme(parts, options.docs.parent / "README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
