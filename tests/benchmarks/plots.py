"""The plots of the report as SVG; the same results give the same bytes."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.page import Parts

matplotlib.use("svg")
matplotlib.rcParams.update({"svg.hashsalt": "forebay", "svg.fonttype": "none", "font.size": 9, "axes.grid": True})

from matplotlib import pyplot  # noqa: E402

Points = Iterable[tuple[float, Any]]


def line(axes: Any, label: str, points: Points, color: str | None = None) -> None:
    """Medians as a line, with the least and the most where a value has them."""
    xs, values = zip(*points, strict=True)
    spreads = [value if isinstance(value, dict) else dict.fromkeys(("median", "min", "max"), value) for value in values]
    medians = [one["median"] for one in spreads]
    below = [one["median"] - one["min"] for one in spreads]
    above = [one["max"] - one["median"] for one in spreads]
    style = {"marker": "o", "markersize": 3, "capsize": 2, "linewidth": 1, "color": color}
    axes.errorbar(xs, medians, yerr=(below, above), label=label, **style)


def names(by_clients: dict[str, dict[str, Any]]) -> list[str]:
    """All systems."""
    return [*dict.fromkeys(system for systems in by_clients.values() for system in systems)]


def ticks(axes: Any, values: Iterable[str]) -> None:
    """Just these, each at its number."""
    axes.set_xticks([int(value) for value in values], [f"{int(value):,}" for value in values])
    axes.minorticks_off()


def title(figure: Any, text: str, part: dict[str, Any]) -> None:
    """What it shows, and on what commit it was made."""
    quick = " (a quick run)" if part["stamp"]["quick"] else ""
    figure.suptitle(f"{text}, commit {part['stamp']['commit']}{quick}")


def overhead(part: dict[str, Any]) -> Any:
    """Requests/s and median latency by clients."""
    figure, grid = pyplot.subplots(2, 2, figsize=(9, 7))
    title(figure, "Overhead of the path", part)
    colors = {system: f"C{number}" for number, system in enumerate(names(part["figures"]["whole"]))}
    for row, mode, name in zip(grid, ("whole", "streamed"), ("not streamed", "streamed, 20 tokens"), strict=True):
        by_clients = part["figures"][mode]
        for axes, field, unit in zip(row, ("requests_per_s", "p50_ms"), ("requests/s", "p50, ms"), strict=True):
            for system in names(by_clients):
                found = [(int(count), one[system][field]) for count, one in by_clients.items() if system in one]
                line(axes, system, found, colors[system])
            axes.set(xscale="log", yscale="log", xlabel=f"clients, {name}", ylabel=unit)
            ticks(axes, by_clients)
    grid[0][0].legend(fontsize="x-small")
    return figure


def overload(part: dict[str, Any]) -> Any:
    """Goodput by offered load."""
    loads, capacity = part["figures"]["loads"].values(), part["figures"]["capacity_per_s"]
    figure, axes = pyplot.subplots(figsize=(7, 4))
    title(figure, "Overload", part)
    line(axes, "goodput", [(one["offered_per_s"], one["goodput_per_s"]) for one in loads])
    offered = [one["offered_per_s"] for one in loads]
    axes.plot(offered, offered, linestyle=":", label="offered")
    axes.set(xlabel="offered requests/s", ylabel="answers/s", ylim=(0, 2 * capacity))
    axes.legend()
    return figure


def tokens(part: dict[str, Any]) -> Any:
    """Tokens/s by clients."""
    by_clients, weights = part["figures"]["clients"], part["figures"]["weights"]
    figure, axes = pyplot.subplots(figsize=(7, 4))
    title(figure, "Tokens of the real model", part)
    for system in names(by_clients):
        found = [(int(count), one[system]["tokens_per_s"]) for count, one in by_clients.items() if system in one]
        line(axes, f"{system} ({weights[system]})", found)
    axes.set(xscale="log", xlabel="clients", ylabel="tokens/s", ylim=(0, None))
    ticks(axes, by_clients)
    axes.legend(fontsize="x-small")
    return figure


def scale(part: dict[str, Any]) -> Any:
    """More workers, more streams, more api processes."""
    figures = part["figures"]
    figure, ((workers, apis), (streams, memory)) = pyplot.subplots(2, 2, figsize=(9, 7))
    title(figure, "More of everything", part)

    def curve(name: str, field: str) -> Points:
        return [(int(count), one[field]) for count, one in figures[name].items()]

    line(workers, "", curve("workers", "requests_per_s"))
    workers.set(xlabel="workers", ylabel="requests/s", ylim=(0, None))
    line(apis, "", curve("api_processes", "requests_per_s"))
    apis.set(xlabel="api processes", ylabel="requests/s", ylim=(0, None))
    ticks(apis, figures["api_processes"])
    line(streams, "", curve("streams", "tokens_per_s"))
    streams.set(xlabel="open streams", ylabel="tokens/s", xscale="log", yscale="log")
    for process in next(iter(figures["streams"].values()))["rss_mb"]:
        line(memory, process, [(int(count), one["rss_mb"][process]) for count, one in figures["streams"].items()])
    memory.set(xlabel="open streams", ylabel="resident MB", ylim=(0, None))
    memory.legend()
    return figure


def backlog(part: dict[str, Any]) -> Any:
    """Publish and pull, divided by an empty queue's, and memory, by what is queued."""
    depths = [(int(depth), one) for depth, one in part["figures"]["depths"].items()]
    figure, (times, memory) = pyplot.subplots(1, 2, figsize=(9, 4))
    title(figure, "Backlog", part)
    for name in ("publish", "pull"):
        line(times, name, [(depth, one[name]["ratio"]) for depth, one in depths])
    times.axhline(1.2, linestyle=":", label="goal")
    times.set(ylabel="time ÷ empty queue's", ylim=(0, None))
    times.legend()
    line(memory, "", [(depth, one["nats_rss_mb"]) for depth, one in depths])
    memory.set(ylabel="nats-server, resident MB", ylim=(0, None))
    for axes in (times, memory):
        axes.set_xscale("symlog", linthresh=1000)
        axes.set(xlabel="queued requests", xlim=(-200, 1.5 * depths[-1][0]))
        ticks(axes, part["figures"]["depths"])
    return figure


PLOTS = {"overhead": overhead, "overload": overload, "tokens": tokens, "scale": scale, "backlog": backlog}


def draw(parts: Parts, folder: Path) -> None:
    """Write `bench-PART.svg` for each part that has a plot and was run."""
    for name in PLOTS.keys() & parts.keys():
        figure = PLOTS[name](parts[name])
        figure.tight_layout()
        path = folder / f"bench-{name}.svg"
        figure.savefig(path, metadata={"Date": None})
        path.write_text("\n".join(text.rstrip() for text in path.read_text().splitlines()) + "\n")
        pyplot.close(figure)
