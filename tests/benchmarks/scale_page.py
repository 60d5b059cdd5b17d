# ruff: noqa: E501 -- prose
"""docs/scale.md: arithmetic from measured figures, and their growth."""

from typing import Any

from benchmarks.curves import Points, growth, knee, linear
from benchmarks.page import Parts, origin, table


def scale(part: dict[str, Any]) -> str:
    """Three curves, each with its order."""
    figures = part["figures"]
    text = [
        f"## More of everything\n\n{origin(part)}\n\n"
        f"![More workers, streams and api processes, commit {part['stamp']['commit']}](images/bench-scale.svg)"
    ]

    def curve(name: str, *path: str) -> Points:
        found = []
        for count, one in figures[name].items():
            for key in path:
                one = one[key]
            found.append((float(count), one))
        return found

    workers = curve("workers", "requests_per_s")
    bend, apis = knee(workers), curve("api_processes", "rss_mb", "api")
    notes = {
        "workers": [
            growth("requests/s by workers", workers if bend is None else [one for one in workers if one[0] <= bend]),
            f"up to {bend:g} workers; each further worker adds less than half of the first"
            if bend is not None
            else f"no knee up to {workers[-1][0]:g} workers",
            *(
                linear(f"{who} by worker", curve("workers", "rss_mb", who), 1, "MB")
                for who in ("nats-server", "worker")
            ),
        ],
        "streams": [
            growth("tokens/s by open streams", curve("streams", "tokens_per_s")),
            *(
                linear(f"{who} by 1,000 open streams", curve("streams", "rss_mb", who), 1000, "MB")
                for who in one_of(figures["streams"])["rss_mb"]
            ),
        ],
        "api_processes": [
            growth("requests/s by api processes", curve("api_processes", "requests_per_s")),
            f"api: {apis[-1][1] / apis[-1][0]:.0f} MB a process where there are {apis[-1][0]:g}",
        ],
    }
    for name, key in (("workers", "requests_per_s"), ("streams", "tokens_per_s"), ("api_processes", "requests_per_s")):
        points = figures[name]
        rows = [
            [count, f"{one[key]:,.0f}", *(f"{value:,.0f}" for value in one["rss_mb"].values())]
            for count, one in points.items()
        ]
        head = [name.replace("_", " "), key.replace("_per_s", "/s"), *(f"{who} MB" for who in one_of(points)["rss_mb"])]
        text.append(f"{table(head, rows)}\n\n{'; '.join(notes[name])}.")
    text.append(
        "n^k is the power with the best fit. The growth of memory is the part above the first row. Load and system share "
        f"the {part['stamp']['cores']} cores. When these are busy, more processes do not help."
    )
    return "\n\n".join(text)


def one_of(curve: dict[str, Any]) -> dict[str, Any]:
    """Any point of a curve."""
    found: dict[str, Any] = next(iter(curve.values()))
    return found


def waiting(part: dict[str, Any]) -> str:
    """The memory of the api for each waiting request."""
    points = [(count, memory["uss"]) for count, memory in part["figures"]["waiting_memory"]["points"]]
    line = linear("api by 1,000 waiting requests, bodies of 109 bytes included", points, 1000, "MB")
    return f"## Memory of waiting requests\n\n{origin(part)}\n\n{line}."


def scale_page(parts: Parts) -> str:
    """docs/scale.md: arithmetic from measured figures."""
    text = [
        "# Scale\n\n`make bench-report` computes this page from the results of `make bench`. Another machine has other "
        "figures. The arithmetic stays the same."
    ]
    if "goals" in parts and "overhead" in parts:
        wire = parts["goals"]["figures"]["wire"]
        cpu = parts["overhead"]["figures"]["whole"]["64"]["forebay"]["cpu_s_per_1000"]
        tokens = parts["goals"]["figures"]["relayed_by_1_worker"]["tokens_per_cpu_second_of_the_api"]["median"]
        rows = [
            [name, *(f"{one[key]:,.1f}" for key in ("in_msgs", "out_msgs", "in_bytes", "out_bytes"))]
            for name, one in wire.items()
        ]
        head = ["a request", "messages in", "out", "bytes in", "out"]
        text.append(
            f"## What a request costs\n\n{origin(parts['goals'])}\n\n{table(head, rows)}\n\nCounted at "
            "nats-server. Whole answers have 5 tokens, streamed ones 20."
        )
        rows = [[name, f"{value['median']:.2f} ms", f"{1000 / value['median']:,.0f}"] for name, value in cpu.items()]
        text.append(
            "## What one core can serve\n\n64 clients, not streamed. The table has the CPU time of a request, and its "
            "reciprocal:\n\n"
            f"{table(['process', 'CPU time of a request', 'requests/s of one core'], rows)}\n\nAn api process "
            f"relays {tokens:,.0f} tokens in a second of CPU time. That is {tokens / 20:,.0f} streams at 20 tokens/s each."
        )
        ratio = cpu["nats-server"]["median"]
        text.append(
            f"## The first limit\n\nApi and worker processes share nothing but NATS, so more processes serve more requests. "
            f"The leader of the stream `INFERENCE` cannot be divided. A request costs {ratio:.2f} ms of its CPU time, so "
            f"one core serves about {1000 / ratio:,.0f} requests/s, including states and counters. A file-stored stream "
            "is written in order. With three replicas each write also waits for another server.\n\nThree changes would "
            "raise this limit:\n\n"
            "1. Different nodes of a cluster lead different streams. First move the leaders of the states' bucket and of "
            "the counters away from that of `INFERENCE`.\n"
            "2. Each model, or each group of models, gets a stream of its own. Their subjects differ already "
            "(`inference.requests.<model>.<type>`), and a request names one model. `MAX_QUEUE_SIZE` then limits each "
            "stream.\n"
            "3. Each region gets a cluster with streams of its own. Gateways (a super-cluster) or leaf nodes connect the "
            "clusters. Clients use the nearest region, because the tokens of an answer should not cross regions.\n\n"
            "Forebay has none of the three. Below the limit they would only add work for operators."
        )
    if "fifty_workers" in parts:
        one = parts["fifty_workers"]["figures"]
        idle, done, killed = one["idle"], one["completed_by_worker"], one["killed"]
        rows = [
            ["load", f"{one['clients']} clients, {one['slots_each']} slots a worker"],
            ["undisturbed", f"{_ends(one['undisturbed'])}, {one['undisturbed']['requests_per_s']}/s"],
            ["completed by a worker", f"{done['least']} to {done['most']}, median {done['median']:g}"],
            [f"{killed['workers']} killed under load", f"{_ends(killed)}, longest {killed['max_s']} s"],
            ["left in the queue", str(one["left_in_the_queue"])],
            ["idle, all workers", f"{idle['workers_percent_of_a_core']} % of a core"],
            ["idle, nats-server", f"{idle['nats_percent_of_a_core']} % of a core, {idle['nats_rss_mb']:.0f} MB"],
            ["idle messages", f"{idle['messages_per_s']} a second (heartbeats, pulls)"],
            ["private memory of a worker", f"{idle['worker_uss_mb']} MB"],
        ]
        text.append(
            f"## {one['workers']} workers on one machine\n\n{origin(parts['fifty_workers'])}\n\n"
            f"`python tests/benchmarks/fifty_workers.py`, the simulated engine:\n\n{table(['', ''], rows)}"
        )
    if "goals" in parts:
        text.append(waiting(parts["goals"]))
    if "scale" in parts:
        text.append(scale(parts["scale"]))
    return "\n\n".join(text) + "\n"


def _ends(one: dict[str, Any]) -> str:
    return f"{one['outcomes']['whole']:,} answers whole, {one['outcomes']['not 200']:,} not 200"
