"""Penalties, biases and postponed ends, for all rows of a pass at once."""

import math
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from forebay_inference.engine.transformers.transfers import part, to_device

if TYPE_CHECKING:
    from forebay_inference.engine.transformers.sampling import Row, TokenChooser


class Histories:
    """What each sequence with penalties has had so far, on the device.

    It counts the token of a pass on the device, before the host knows it. A sequence keeps its row of the tables until
    it is forgotten.
    """

    def __init__(self, vocabulary: int, device: torch.device) -> None:
        self._counts = torch.zeros(0, vocabulary, device=device)
        self._seen = torch.zeros(0, vocabulary, dtype=torch.bool, device=device)
        self._free: list[int] = []

    def penalise(self, rows: Sequence["Row"], scores: torch.Tensor) -> None:
        """Apply the penalties of `rows` to `scores`, shape [rows, vocabulary], in place."""
        if not rows:
            return
        places = to_device([self._place(row) for row in rows], torch.long, scores.device)
        asked = [row.chooser.sampling for row in rows]
        numbers = [(one.repetition_penalty, one.frequency_penalty, one.presence_penalty) for one in asked]
        repetition, frequency, presence = to_device(numbers, torch.float32, scores.device).T.unsqueeze(2)
        with part(scores, [row.at for row in rows]) as theirs:
            if any(one.repetition_penalty != 1.0 for one in asked):
                penalised = torch.where(theirs > 0, theirs / repetition, theirs * repetition)
                torch.where(self._seen[places], penalised, theirs, out=theirs)
            if any(one.frequency_penalty or one.presence_penalty for one in asked):
                counts = self._counts[places]
                theirs -= frequency * counts
                theirs -= presence * (counts > 0)

    def add(self, rows: Sequence["Row"], tokens: torch.Tensor) -> None:
        """Count the token that each of `rows` has chosen; `tokens` are those of all rows of the pass."""
        rows = [row for row in rows if row.chooser.penalised]
        if not rows:
            return
        for row in rows:
            row.chooser.counted = row.position + 1
        places = to_device([row.chooser.history for row in rows], torch.long, tokens.device)
        chosen = tokens[to_device([row.at for row in rows], torch.long, tokens.device)]
        one = torch.ones(len(rows), device=tokens.device)
        self._counts.index_put_((places, chosen), one, accumulate=True)
        self._seen.index_put_((places, chosen), one.bool())

    def _place(self, row: "Row") -> int:
        chooser = row.chooser
        if chooser.history is None:
            if not self._free:
                self._grow()
            chooser.history = self._free.pop()
            # Whoever gets it next writes it anew, behind the passes that still read it.
            weakref.finalize(chooser, self._free.append, chooser.history).atexit = False
        if chooser.counted != row.position:
            # Its first token here, or it was taken out of the cache and the token of a pass thrown away.
            self._write(chooser.history, chooser)
        return chooser.history

    def _grow(self) -> None:
        known, more = self._counts.size(0), max(self._counts.size(0), 4)
        self._counts = torch.cat((self._counts, self._counts.new_zeros(more, self._counts.size(1))))
        self._seen = torch.cat((self._seen, self._seen.new_zeros(more, self._seen.size(1))))
        self._free += range(known, known + more)

    def _write(self, place: int, chooser: "TokenChooser") -> None:
        device, count = self._counts.device, len(chooser.tokens)
        tokens = to_device([*chooser.tokens, *chooser.prompt], torch.long, device)
        self._counts[place].zero_().index_add_(0, tokens[:count], torch.ones(count, device=device))
        self._seen[place].zero_().index_fill_(0, tokens, True)


def add_biases(rows: Sequence["Row"], scores: torch.Tensor) -> None:
    """Add the biases of `rows` to `scores`, shape [rows, vocabulary], in place."""
    if not rows:
        return
    biases = [(row.at, token, bias) for row in rows for token, bias in row.chooser.sampling.logit_bias.items()]
    indices, tokens, values = zip(*biases, strict=True)
    places = to_device((indices, tokens), torch.long, scores.device)
    scores.index_put_(tuple(places), to_device(values, torch.float32, scores.device), accumulate=True)


def postpone_ends(rows: Sequence["Row"], scores: torch.Tensor) -> None:
    """Forbid the end tokens of `rows` in `scores`, shape [rows, vocabulary], in place, where any other token is left:
    a grammar may allow nothing else."""
    if not rows:
        return
    most = max(len(row.chooser.ends) for row in rows)
    padded = [row.chooser.ends + row.chooser.ends[:1] * (most - len(row.chooser.ends)) for row in rows]
    ends = to_device(padded, torch.long, scores.device)
    with part(scores, [row.at for row in rows]) as theirs:
        before = theirs.gather(1, ends)
        theirs.scatter_(1, ends, -math.inf)
        nothing_left = torch.isneginf(theirs).all(dim=1, keepdim=True)
        theirs.scatter_(1, ends, before.masked_fill(~nothing_left, -math.inf))
