"""Grammars that a sequence's tokens must follow, as masks over the vocabulary."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from forebay_inference.engine.matchers import Matchers, matcher_fault


class Guide:
    """The state of one sequence in its grammar; lives on the engine's thread once it is in the batch."""

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary

    def mask(self, scores: torch.Tensor) -> None:
        """Forbid in `scores`, shape [vocabulary], every token that the grammar does not allow next, in place.

        Raises:
            InvalidRequest: the grammar has become too large on the way, as it would in each further attempt.
        """
        packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise matcher_fault(self._matcher)
        allowed = torch.from_numpy(np.unpackbits(packed, count=self._vocabulary, bitorder="little"))
        scores.masked_fill_(allowed.to(scores.device) == 0, -torch.inf)

    def accept(self, tokens: Sequence[int]) -> None:
        """`tokens` are the next of the sequence.

        Raises:
            EngineFault: the grammar does not allow them.
            InvalidRequest: as `mask`.
        """
        if tokens and not self._matcher.consume_tokens(list(tokens)):
            raise matcher_fault(self._matcher)


class Grammar:
    """A grammar that is ready for the sequences of one request.

    They share what is computed of it, and the library's limits on that. So no other request may.
    """

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary

    def guide(self) -> Guide:
        """A guide at the beginning."""
        return Guide(self._matcher.deep_copy(), self._vocabulary)


class Grammars(Matchers):
    """Compiles grammars for the guides of a batch."""

    def compile(self, text: str) -> Grammar:
        """See `Matchers.compile`."""
        return Grammar(super().compile(text), self.size)
