"""How the next token of each sequence is chosen: every sequence by its own parameters, all rows of a pass at once.

Nothing here waits for the device: what a row asks goes to it from pinned memory, and what it answers comes back with an
event. Otherwise each pass would wait for the one before.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from forebay_inference.engine.protocol import Fault, TokenLogprob, TokenRequest, as_fault
from forebay_inference.engine.transformers.guided import Guide, forbid
from forebay_inference.engine.transformers.penalties import Histories, add_biases, postpone_ends
from forebay_inference.engine.transformers.transfers import Fetched, part, to_device

_TEMPERATURE_FLOOR = 1e-5
_NUCLEUS_GUESS = 512
_MASK_32 = 0xFFFF_FFFF


class TokenChooser:
    """What one sequence asks of the choice of its tokens; lives on the engine's thread.

    Random numbers are a function of the request's seed, the choice's number and the token's position alone: a
    sequence that is taken up again after `generated` tokens goes on exactly as it would have, whatever else is
    in the batch.

    `tokens` are those that are known; a pass may compute one before the last is. `guided` of them are accepted by the
    grammar. `counted` of them are in the row `history` of the tables of Histories. `outcomes` are the faults and the
    log probabilities by the position of their token.
    """

    def __init__(self, request: TokenRequest, guide: Guide | None = None) -> None:
        self.sampling = sampling = request.sampling
        self.greedy = sampling.temperature < _TEMPERATURE_FLOOR
        self.prompt = request.prompt
        self.tokens = list(request.generated)
        self.ends = sorted(request.end_tokens)
        self.outcomes: dict[int, Fault | TokenLogprob | _Noted] = {}
        self.guide = guide
        self.guided = len(self.tokens)
        if guide is not None:
            guide.accept(request.generated)
        self.penalised = bool(
            sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1.0
        )
        self.history: int | None = None
        self.counted: int | None = None
        early = sampling.min_tokens > len(self.tokens) and bool(self.ends)
        self.adjusts = self.penalised or bool(sampling.logit_bias) or early or guide is not None
        self.plain = self.greedy and not self.adjusts and sampling.logprobs is None
        self._seed = request.seed

    def accept(self, token: int) -> None:
        """`token` is the next one of the sequence."""
        self.tokens.append(token)
        if self.guided < len(self.tokens):
            self.accept_early(token)

    def accept_early(self, token: int) -> None:
        """`token` is the next one, for the grammar alone."""
        if self.guide is not None:
            self.guide.accept([token])
            self.guided += 1

    def key(self, position: int) -> tuple[int, int]:
        """Two 32-bit numbers that the randomness of the token at `position` is drawn from."""
        digest = hashlib.blake2b(f"{self._seed}:{position}".encode(), digest_size=8).digest()
        return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")

    def outcome(self, position: int) -> Fault | TokenLogprob | None:
        """The fault or the log probability of the token at `position`, once."""
        found = self.outcomes.pop(position, None)
        return found.logprob() if isinstance(found, _Noted) else found


class Row(NamedTuple):
    """A row of the scores of a pass: who chooses there, and the position of that token among the generated ones."""

    at: int
    chooser: TokenChooser
    position: int


class _Noted(NamedTuple):
    """The log probability of one token, still with those of its pass."""

    fetched: Fetched
    row: int
    top: int

    def logprob(self) -> TokenLogprob:
        tokens, own, indices, values = (column[self.row] for column in self.fetched.lists())
        top = zip(indices[: self.top], values[: self.top], strict=True)
        return TokenLogprob(tokens, own, tuple(top))


def choose(rows: Sequence[Row], scores: torch.Tensor, histories: Histories) -> torch.Tensor:
    """The token of each row of `scores`, shape [rows].

    `scores` is float32 of shape [rows, vocabulary], and is written to. `rows` are those in which a sequence chooses, in
    order; other rows get their best token, as those of greedy sequences do, which cost nothing here.
    """
    busy = [row for row in rows if not row.chooser.plain]
    if not busy:
        return scores.argmax(dim=-1)
    noted = [row for row in busy if row.chooser.sampling.logprobs is not None]
    if noted:
        raw = scores[to_device([row.at for row in noted], torch.long, scores.device)]
    adjust([row for row in busy if row.chooser.adjusts], scores, histories)
    sampled = [row for row in busy if not row.chooser.greedy]
    if sampled:
        with part(scores, [row.at for row in sampled]) as theirs:
            narrow([row.chooser for row in sampled], theirs)
            keys = [row.chooser.key(row.position) for row in sampled]
            theirs += gumbel_noise(keys, scores.size(1), scores.device)
    tokens = scores.argmax(dim=-1)
    histories.add(busy, tokens)
    if noted:
        _note(noted, raw, tokens)
    return tokens


def adjust(rows: Sequence[Row], scores: torch.Tensor, histories: Histories) -> None:
    """Apply the penalties, biases and grammars of `rows` to `scores`, shape [rows, vocabulary], in place."""
    if not rows:
        return
    histories.penalise([row for row in rows if row.chooser.penalised], scores)
    add_biases([row for row in rows if row.chooser.sampling.logit_bias], scores)
    # One that is not at its position has ended, which the batch does not know yet: its token is thrown away.
    guided = [row for row in rows if row.chooser.guide is not None and row.chooser.guided == row.position]
    if guided:
        faults = forbid([(row.at, row.chooser.guide) for row in guided if row.chooser.guide], scores)
        for place, fault in faults.items():
            # One sequence's trouble must not end the thread that all share.
            guided[place].chooser.outcomes[guided[place].position] = as_fault(fault)
    early = [row for row in rows if row.position < row.chooser.sampling.min_tokens and row.chooser.ends]
    postpone_ends(early, scores)


def narrow(choosers: Sequence[TokenChooser], scores: torch.Tensor) -> None:
    """Apply temperature, top-k, top-p and min-p to `scores`, shape [choosers, vocabulary], in place."""
    asked = [chooser.sampling for chooser in choosers]
    vocabulary = scores.size(1)

    def column(values: Sequence[float], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return to_device(values, dtype, scores.device).unsqueeze(1)

    if any(one.temperature != 1.0 for one in asked):
        scores /= column([one.temperature for one in asked])
    ks = [one.top_k if 0 < one.top_k < vocabulary else 0 for one in asked]
    if any(ks):
        best = torch.topk(scores, max(ks)).values
        least = best.gather(1, column([max(k - 1, 0) for k in ks], torch.long))
        _cut(scores, least, column([float(bool(k)) for k in ks]))
    if any(one.top_p < 1.0 for one in asked):
        # 0 is the likeliest token alone, and no row without top-p makes the search longer.
        _cut(
            scores,
            _nucleus_floors(scores, column([one.top_p if one.top_p < 1.0 else 0.0 for one in asked])),
            column([float(one.top_p < 1.0) for one in asked]),
        )
    if any(one.min_p > 0.0 for one in asked):
        below = column([math.log(one.min_p) if one.min_p > 0.0 else -math.inf for one in asked])
        scores.masked_fill_(scores < scores.max(dim=-1, keepdim=True).values + below, -math.inf)


def _cut(scores: torch.Tensor, floors: torch.Tensor, wanted: torch.Tensor) -> None:
    """Forbid what is below its row's floor, [rows, 1], in the rows where `wanted` is not 0."""
    scores.masked_fill_((scores < floors) & (wanted > 0), -math.inf)


def _nucleus_floors(scores: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """In each row the least score among the most likely tokens that together reach `top_p`: [rows, 1]."""
    total = torch.logsumexp(scores, dim=-1, keepdim=True)
    vocabulary = scores.size(1)
    # Sorting a whole vocabulary costs a CPU milliseconds, and the nucleus nearly always lies in its top. A GPU would
    # have to be waited for to see whether it does.
    sizes = (min(_NUCLEUS_GUESS, vocabulary), vocabulary) if scores.device.type == "cpu" else (vocabulary,)
    for size in sizes:
        ordered = torch.topk(scores, size).values if size < vocabulary else scores.sort(descending=True).values
        reached = torch.cumsum(torch.exp(ordered - total), dim=-1)
        if size == vocabulary or bool((reached[:, -1:] >= top_p).all()):
            break
    kept = (reached < top_p).sum(dim=-1, keepdim=True).clamp_(max=ordered.size(1) - 1)
    return ordered.gather(1, kept)


def _note(rows: Sequence[Row], raw: torch.Tensor, tokens: torch.Tensor) -> None:
    """Keep the log probabilities of the tokens of `rows` under the model's own scores `raw`, [rows, vocabulary]."""
    logprobs = torch.log_softmax(raw, dim=-1)
    chosen = tokens[to_device([row.at for row in rows], torch.long, raw.device)]
    best = torch.topk(logprobs, max(row.chooser.sampling.logprobs or 0 for row in rows))
    fetched = Fetched(chosen, logprobs.gather(1, chosen.unsqueeze(1))[:, 0], best.indices, best.values)
    for place, row in enumerate(rows):
        row.chooser.outcomes.setdefault(row.position, _Noted(fetched, place, row.chooser.sampling.logprobs or 0))


def gumbel_noise(keys: Sequence[tuple[int, int]], vocabulary: int, device: torch.device) -> torch.Tensor:
    """Gumbel noise of shape [keys, vocabulary] by a counter-based hash of key and token.

    The highest score plus noise is a draw from the softmax of the scores. Each number depends on its key and its
    token alone, so small differences in the scores (another batch, another kernel) seldom change the draw.
    """
    halves = to_device([[_as_int32(half) for half in key] for key in keys], torch.int32, device)
    low, high = halves[:, :1], halves[:, 1:]
    counter = torch.arange(vocabulary, dtype=torch.int32, device=device) * _as_int32(0x9E37_79B1)
    bits = counter.unsqueeze(0) + low
    for multiplier in (0x7FEB_352D, 0x846C_A68B):
        bits ^= (bits >> 16) & 0xFFFF
        bits *= _as_int32(multiplier)
        bits ^= high
    bits ^= (bits >> 15) & 0x1FFFF
    # 23 bits and a half: one more would round up to 1, whose noise is infinite.
    uniform = ((bits >> 9) & 0x7F_FFFF).float().add_(0.5).mul_(2.0**-23)
    return uniform.log_().neg_().log_().neg_()


def _as_int32(value: int) -> int:
    value &= _MASK_32
    return value - (1 << 32) if value >= 1 << 31 else value
