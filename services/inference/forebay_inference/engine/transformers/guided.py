"""Grammars that a sequence's tokens must follow, as masks over the vocabulary."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from forebay_inference.engine.matchers import Matchers, matcher_fault
from forebay_inference.engine.transformers.transfers import part


class Guide:
    """The state of one sequence in its grammar; lives on the engine's thread once it is in the batch."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def allowed(self) -> bytes:
        """The tokens that the grammar allows next, a bit each, the first in the lowest bit.

        Raises:
            InvalidRequest: the grammar has become too large on the way, as it would in each further attempt.
        """
        packed: bytes = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise matcher_fault(self._matcher)
        return packed

    def accept(self, tokens: Sequence[int]) -> None:
        """`tokens` are the next of the sequence.

        Raises:
            EngineFault: the grammar does not allow them.
            InvalidRequest: as `allowed`.
        """
        if tokens and not self._matcher.consume_tokens(list(tokens)):
            raise matcher_fault(self._matcher)


def forbid(guides: Sequence[tuple[int, Guide]], scores: torch.Tensor) -> dict[int, Exception]:
    """Forbid in `scores`, shape [rows, vocabulary], in place, what the guide of a row does not allow next.

    Returns the faults of guides, by their place in `guides`. One table of bits goes to the device for all rows.
    """
    vocabulary = scores.size(1)
    faults: dict[int, Exception] = {}
    table = np.full((len(guides), -(-vocabulary // 8)), 0xFF, dtype=np.uint8)
    for place, (_, guide) in enumerate(guides):
        try:
            table[place] = np.frombuffer(guide.allowed(), dtype=np.uint8, count=table.shape[1])
        except Exception as exc:  # of one sequence, and not of the pass
            faults[place] = exc
    if scores.device.type == "cpu":
        allowed = torch.from_numpy(np.unpackbits(table, axis=1, count=vocabulary, bitorder="little"))
    else:
        bits = torch.from_numpy(table).pin_memory().to(scores.device, non_blocking=True).unsqueeze(2)
        allowed = (bits >> torch.arange(8, dtype=torch.uint8, device=scores.device)) & 1
        allowed = allowed.flatten(1)[:, :vocabulary]
    with part(scores, [row for row, _ in guides]) as theirs:
        theirs.masked_fill_(allowed == 0, -torch.inf)
    return faults


class Grammar:
    """A grammar that is ready for the sequences of one request.

    They share what is computed of it, and the library's limits on that. So no other request may.
    """

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def guide(self) -> Guide:
        """A guide at the beginning."""
        return Guide(self._matcher.deep_copy())


class Grammars(Matchers):
    """Compiles grammars for the guides of a batch."""

    def compile(self, text: str) -> Grammar:
        """See `Matchers.compile`."""
        return Grammar(super().compile(text))
