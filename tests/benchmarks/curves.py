"""How a figure grows with a size: the exponent of the power that fits best, its order, its slope, its knee."""

import math
from collections.abc import Sequence
from itertools import pairwise

from benchmarks.common import slope

Points = Sequence[tuple[float, float]]
FLAT, LINEAR = 0.1, 0.15
"""How far an exponent may be from 0 and from 1 to be called so: what figures of so few seconds can tell apart."""
KNEE = 0.5
"""Where more brings less than this part of what the first brought."""


def exponent(points: Points) -> float | None:
    """The k of y ~ x^k; None with fewer than two points above zero."""
    logs = [(math.log(x), math.log(y)) for x, y in points if x > 0 and y > 0]
    return slope(logs) if len(logs) > 1 else None


def above_first(points: Points) -> Points:
    """What the points have more than the first: the growth without what is there anyway."""
    (x0, y0), *rest = points
    return [(x - x0, y - y0) for x, y in rest]


def order(power: float) -> str:
    """Its name."""
    if abs(power) <= FLAT:
        return "O(1)"
    return "O(n)" if abs(power - 1) <= LINEAR else f"O(n^{power:.1f})"


def knee(points: Points) -> float | None:
    """The size up to which more brings more; None where that is so up to the last."""
    first = points[0][1] / points[0][0]
    for (x0, y0), (x1, y1) in pairwise(points):
        if (y1 - y0) / (x1 - x0) < KNEE * first:
            return x0
    return None


def growth(name: str, points: Points) -> str:
    """A line: `name` grows by which power of the size."""
    power = exponent(points)
    return f"{name}: too few points" if power is None else f"{name}: n^{power:.2f}, {order(power)}"


def linear(name: str, points: Points, per: float, unit: str) -> str:
    """A line: how much `name` grows by each `per` of the size, and, where the points tell, in which order."""
    power = exponent(above_first(points))
    shape = "" if power is None else f" (its growth n^{power:.2f}, {order(power)})"
    return f"{name}: {per * slope(points):.3g} {unit}{shape}"
