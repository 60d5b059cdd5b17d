"""What both pages of the report are made of."""

from typing import Any

Parts = dict[str, dict[str, Any]]
"""The results by the name of their part."""


def cell(value: dict[str, float], digits: int = 1) -> str:
    """Median, and in brackets the least and the most."""
    return f"{value['median']:,.{digits}f} ({value['min']:,.{digits}f} to {value['max']:,.{digits}f})"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def origin(part: dict[str, Any]) -> str:
    """One line: on what and when."""
    stamp = part["stamp"]
    note = " **A quick run: short slices and few rounds, a figure to be replaced.**" if stamp["quick"] else ""
    versions = ", ".join(f"{name} {number}" for name, number in stamp["versions"].items())
    return (
        f"*Commit {stamp['commit']}, {stamp['at']}, {stamp['cores']} cores of {stamp['cpu']}, load before it "
        f"{stamp['load_before']}; {versions}; took {stamp['took_s']} s.*{note}"
    )


def plot(name: str, text: str, part: dict[str, Any]) -> str:
    """The picture of `plots.py`."""
    return f"![{text}, commit {part['stamp']['commit']}](images/bench-{name}.svg)"
