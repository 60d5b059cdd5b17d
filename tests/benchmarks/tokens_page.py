# ruff: noqa: E501 -- prose
"""The parts of docs/benchmarks.md about the real model: `tokens` and `served`."""

from typing import Any

from benchmarks.page import cell, origin, plot, table


def tokens(part: dict[str, Any]) -> str:
    """The real model beside what would serve it otherwise."""
    figures = part["figures"]
    rows = []
    for clients, systems in figures["clients"].items():
        for name, one in systems.items():
            values = [cell(one[key]) for key in ("tokens_per_s", "first_ms", "between_ms")]
            ratio = cell(one["forebay_to_this"], 2) if "forebay_to_this" in one else ""
            rows.append([clients, name, figures["weights"][name], *values, ratio])
    head = ["clients", "", "weights", "tokens/s", "first token ms", "between tokens ms", "Forebay's tokens/s ÷"]
    weights, busy = figures["weights"]["forebay"], figures.get("busy", 0)
    title = "Tokens" + f", {weights}" * (weights != "bf16") + f", beside {busy} busy processes" * bool(busy)
    picture = f"{plot('tokens', 'Tokens/s by clients', part)}\n\n" if title == "Tokens" else ""
    text = f"## {title}\n\n{origin(part)}\n\n{picture}{table(head, rows)}"
    if bare := figures["bare"]:
        text += (
            f"\n\nTokens/s of the whole system ÷ those of the engine "
            f"alone in one process, {bare['clients']} clients, {bare['pairs']} pairs: {cell(bare['ratio'], 3)}. The worker's "
            f"CPU time for a token ÷ the bare engine's: {cell(bare['worker_cpu_to_bare'], 3)}. The part above 1 is Forebay's."
        )
    if seen := figures.get("aiperf"):
        names = {"tokens_per_s": "tokens/s", "first_ms": "first token ms", "between_ms": "between tokens ms"}
        rows = [
            [name, *(f"{seen[key][field]:,.2f}" for key in ("aiperf", "own", "own_to_aiperf"))]
            for field, name in names.items()
        ]
        head = [f"Forebay, {seen['clients']} clients", "by AIPerf", "by this script", "ratio"]
        text += f"\n\nThe same load, {seen['requests']} requests, measured by AIPerf:\n\n{table(head, rows)}"
    return text + "".join(f"\n\nNot measured: {name}: {reason}" for name, reason in figures["missing"].items())


SERVERS = {"vllm": "vLLM", "llamacpp": "llama.cpp", "transformers": "`transformers serve --continuous-batching`"}


def served(part: dict[str, Any]) -> str:
    """An inference server through Forebay, or Forebay's engine, beside the server alone."""
    figures = part["figures"]
    server, own = SERVERS[figures["engine"]], figures["engine"] == "transformers"
    rows = []
    for load, one in figures["clients"].items():
        pairs = [[cell(one[who][key]) for who in ("forebay", "alone")] for key in ("tokens_per_s", "first_ms")]
        ratios = [cell(one[f"{key}_to_alone"], 2) for key in ("tokens_per_s", "first_ms")]
        rows.append([load, *pairs[0], ratios[0], *pairs[1], ratios[1]])
    head = ["clients", "tokens/s", "alone", "÷", "first token ms", "alone", "÷"]
    title = f"Forebay's engine beside {server}" if own else f"{server} through Forebay and alone"
    title += ": longer prompts" * (figures["prompts"] == "long")
    return f"## {title}\n\n{origin(part)}\n\n{table(head, rows)}"
