"""What a server tells on `/metrics`, in Prometheus' text format."""

from collections.abc import Collection


def samples(text: bytes, names: Collection[str]) -> dict[str, list[float]]:
    """The values of the metrics `names`, over all their labels; empty for one that is not told."""
    found: dict[str, list[float]] = {name: [] for name in names}
    for line in text.decode().splitlines():
        name = line.partition("{" if "{" in line else " ")[0]
        if name in found:
            found[name].append(float(line.rpartition(" ")[2]))
    return found
