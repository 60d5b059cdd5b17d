"""How the next token of each sequence is chosen: every sequence by its own parameters, in one forward pass."""

import hashlib
import math
from collections.abc import Sequence

import torch

from forebay_inference.engine.protocol import Fault, TokenLogprob, TokenRequest, as_fault
from forebay_inference.engine.transformers.guided import Guide

_TEMPERATURE_FLOOR = 1e-5
_NUCLEUS_GUESS = 512
_MASK_32 = 0xFFFF_FFFF


class TokenChooser:
    """The sampling state of one sequence; lives on the engine's thread.

    Random numbers are a function of the request's seed, the choice's number and the token's position alone: a
    sequence that is taken up again after `generated` tokens goes on exactly as it would have, whatever else is
    in the batch.
    """

    def __init__(
        self, request: TokenRequest, vocabulary: int, device: torch.device, guide: Guide | None = None
    ) -> None:
        self.sampling = sampling = request.sampling
        self.greedy = sampling.temperature < _TEMPERATURE_FLOOR
        self.position = len(request.generated)
        self.logprob: TokenLogprob | None = None
        self.fault: Fault | None = None
        self._seed = request.seed
        self._guide = guide
        self._counts: torch.Tensor | None = None
        self._seen: torch.Tensor | None = None
        self._bias: tuple[torch.Tensor, torch.Tensor] | None = None
        if sampling.presence_penalty or sampling.frequency_penalty:
            self._counts = torch.zeros(vocabulary, device=device)
        if sampling.repetition_penalty != 1.0:
            self._seen = torch.zeros(vocabulary, dtype=torch.bool, device=device)
            self._seen[torch.tensor(list(request.prompt), device=device, dtype=torch.long)] = True
        if sampling.logit_bias:
            tokens = torch.tensor(list(sampling.logit_bias), device=device, dtype=torch.long)
            self._bias = (tokens, torch.tensor(list(sampling.logit_bias.values()), device=device))
        self._ends: torch.Tensor | None = None
        if sampling.min_tokens > self.position and request.end_tokens:
            self._ends = torch.tensor(sorted(request.end_tokens), device=device)
        for token in request.generated:
            self._count(token)
        if guide is not None:
            guide.accept(request.generated)
        self.adjusts = any(part is not None for part in (self._counts, self._seen, self._bias, self._ends, guide))
        self.plain = self.greedy and not self.adjusts and sampling.logprobs is None

    def accept(self, token: int) -> None:
        """`token` is the next one of the sequence."""
        self.position += 1
        self._count(token)
        if self._guide is not None:
            self._guide.accept([token])

    def _count(self, token: int) -> None:
        if self._counts is not None:
            self._counts[token] += 1
        if self._seen is not None:
            self._seen[token] = True

    def adjust(self, scores: torch.Tensor) -> None:
        """Apply penalties, biases and grammar to `scores`, shape [vocabulary], in place."""
        sampling = self.sampling
        if self._seen is not None:
            penalty = sampling.repetition_penalty
            penalised = torch.where(scores > 0, scores / penalty, scores * penalty)
            torch.where(self._seen, penalised, scores, out=scores)
        if self._counts is not None:
            scores -= sampling.frequency_penalty * self._counts
            scores -= sampling.presence_penalty * (self._counts > 0)
        if self._bias is not None:
            scores.index_add_(0, self._bias[0], self._bias[1])
        if self._guide is not None:
            self._guide.mask(scores)
        if self._ends is not None and self.position < sampling.min_tokens:
            ends = scores[self._ends]
            scores[self._ends] = -math.inf
            if bool(torch.isneginf(scores).all()):
                # The grammar allows nothing else any more.
                scores[self._ends] = ends

    def narrow(self, scores: torch.Tensor) -> None:
        """Apply temperature, top-k, top-p and min-p to `scores`, shape [vocabulary], in place."""
        sampling = self.sampling
        if sampling.temperature != 1.0:
            scores /= sampling.temperature
        if 0 < sampling.top_k < scores.numel():
            least = torch.topk(scores, sampling.top_k).values[-1]
            scores[scores < least] = -math.inf
        if sampling.top_p < 1.0:
            scores[scores < _nucleus_floor(scores, sampling.top_p)] = -math.inf
        if sampling.min_p > 0.0:
            scores[scores < scores.max() + math.log(sampling.min_p)] = -math.inf

    def key(self) -> tuple[int, int]:
        """Two 32-bit numbers that the randomness of the next token is drawn from."""
        digest = hashlib.blake2b(f"{self._seed}:{self.position}".encode(), digest_size=8).digest()
        return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")

    def note_logprob(self, raw: torch.Tensor, token: int) -> None:
        """Keep the log probability of `token` under the model's own scores `raw`, shape [vocabulary]."""
        count = self.sampling.logprobs or 0
        logprobs = torch.log_softmax(raw, dim=-1)
        top: tuple[tuple[int, float], ...] = ()
        if count:
            best = torch.topk(logprobs, count)
            top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        self.logprob = TokenLogprob(token, float(logprobs[token]), top)


def choose(rows: Sequence[tuple[int, TokenChooser]], scores: torch.Tensor) -> None:
    """Make the highest of each row of `scores` the token that its sequence gets, in place.

    `scores` is float32 of shape [rows, vocabulary]; each pair names a row and who chooses there. The caller
    takes the argmax of each row, so a batch of greedy sequences costs nothing here.
    """
    busy = [(row, chooser) for row, chooser in rows if not chooser.plain]
    if not busy:
        return
    raw = {row: scores[row].clone() for row, chooser in busy if chooser.sampling.logprobs is not None}
    for row, chooser in busy:
        if chooser.adjusts:
            try:
                chooser.adjust(scores[row])
            except Exception as exc:  # one sequence's trouble must not end the thread that all share
                chooser.fault = as_fault(exc)
    sampled = [(row, chooser) for row, chooser in busy if not chooser.greedy]
    if sampled:
        for row, chooser in sampled:
            chooser.narrow(scores[row])
        noise = gumbel_noise([chooser.key() for _, chooser in sampled], scores.size(1), scores.device)
        scores[torch.tensor([row for row, _ in sampled], device=scores.device)] += noise
    for row, chooser in busy:
        if row in raw:
            chooser.note_logprob(raw[row], int(scores[row].argmax()))


def gumbel_noise(keys: Sequence[tuple[int, int]], vocabulary: int, device: torch.device) -> torch.Tensor:
    """Gumbel noise of shape [keys, vocabulary] by a counter-based hash of key and token.

    The highest score plus noise is a draw from the softmax of the scores. Each number depends on its key and its
    token alone, so small differences in the scores (another batch, another kernel) seldom change the draw.
    """
    low = torch.tensor([_as_int32(key[0]) for key in keys], dtype=torch.int32, device=device).unsqueeze(1)
    high = torch.tensor([_as_int32(key[1]) for key in keys], dtype=torch.int32, device=device).unsqueeze(1)
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


def _nucleus_floor(scores: torch.Tensor, top_p: float) -> torch.Tensor:
    """The least score among the most likely tokens that together reach `top_p`; `scores` has shape [vocabulary]."""
    total = torch.logsumexp(scores, dim=-1)
    for size in (min(_NUCLEUS_GUESS, scores.numel()), scores.numel()):
        # Sorting a whole vocabulary costs milliseconds, and the nucleus nearly always lies in its top.
        ordered = torch.topk(scores, size).values
        reached = torch.cumsum(torch.exp(ordered - total), dim=-1)
        if size == scores.numel() or float(reached[-1]) >= top_p:
            break
    kept = int((reached < top_p).sum())
    return ordered[min(kept, ordered.numel() - 1)]
