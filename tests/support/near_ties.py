"""Greedy answers of one model, computed in two ways that round differently."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from support.engine import Answer

NEAR_TIE = 0.5
"""The most, in nats, by which one token may lead another and rounding still choose between them.

Logits are bf16: between 16 and 32, where the best ones are, they are multiples of 0.125. Kernels for AVX2 in place of
AVX-512 moved one log probability by up to 0.16, so the distance of two by up to 0.33.
"""


@dataclass(frozen=True)
class Step:
    """One token of a greedy answer, and the log probabilities of the likeliest tokens at its place."""

    token: Any
    likeliest: Mapping[Any, float]

    def nearly_was(self, token: Any) -> bool:
        """Whether `token` was at most NEAR_TIE behind the best."""
        return token in self.likeliest and max(self.likeliest.values()) - self.likeliest[token] <= NEAR_TIE

    def nearly_was_another(self) -> bool:
        """Whether any other token was at most NEAR_TIE behind the best."""
        return any(token != self.token and self.nearly_was(token) for token in self.likeliest)


def steps_of(answer: Answer) -> list[Step]:
    """The steps of an engine's answer that was asked for with logprobs."""
    return [Step(one.token, {top.token: top.logprob for top in one.top}) for one in answer.logprobs]


def same_or_near_tie(one: Sequence[Step], other: Sequence[Step]) -> bool:
    """Whether two greedy answers are the same, or part where their tokens were nearly equally likely in both.

    What follows such a place is not compared. An answer that ends earlier chose the end there, which has no step: the
    longer one must have been in doubt.
    """
    for first, second in zip(one, other, strict=False):
        if first.token != second.token:
            return first.nearly_was(second.token) and second.nearly_was(first.token)
    longer = max(one, other, key=len)
    shorter = min(len(one), len(other))
    return len(longer) == shorter or longer[shorter].nearly_was_another()
