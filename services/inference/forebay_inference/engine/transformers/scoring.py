"""How likely the tokens of prompts are, computed in the passes of the batch."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from forebay_inference.engine.protocol import TokenLogprob
from forebay_inference.engine.transformers.passes import requests_of

SCORED_TOKENS: Final = 512
"""Most tokens of prompts that are scored in one pass. It bounds the memory: as many scores of the whole vocabulary."""

SCORED_PART: Final = SCORED_TOKENS // 2
"""Tokens of one prompt that are scored together, so that the next part waits in the batch while one is computed."""

_ROWS_AT_ONCE: Final = 32


@dataclass(slots=True, eq=False)
class Scored:
    """The log probabilities of one sequence's `targets`, each with `top` alternatives.

    The first target follows position `start` of the prompt."""

    start: int
    targets: Sequence[int]
    top: int
    found: dict[int, TokenLogprob] = field(default_factory=dict)

    def note(self, places: Sequence[int], scores: torch.Tensor) -> None:
        """`scores`, shape [places, vocabulary], are the model's for the targets at `places`."""
        for at in range(0, len(places), _ROWS_AT_ONCE):
            part = places[at : at + _ROWS_AT_ONCE]
            logprobs = torch.log_softmax(scores[at : at + _ROWS_AT_ONCE].float(), dim=-1)
            tokens = torch.tensor([self.targets[place] for place in part], device=logprobs.device)
            own = logprobs.gather(1, tokens.unsqueeze(1))
            ranks = (logprobs > own).sum(dim=1) + 1
            best = torch.topk(logprobs, self.top)
            columns = own[:, 0].tolist(), ranks.tolist(), best.indices.tolist(), best.values.tolist()
            for place, logprob, rank, others, values in zip(part, *columns, strict=True):
                top = tuple(zip(others, values, strict=True))
                self.found[place] = TokenLogprob(self.targets[place], logprob, top, rank)

    def all(self) -> tuple[TokenLogprob, ...]:
        """All targets, in order; raises KeyError if one was not computed."""
        return tuple(self.found[place] for place in range(len(self.targets)))


class Room:
    """At most `size` at once; first come, first served."""

    def __init__(self, size: int) -> None:
        self._left = size
        self._turn = asyncio.Lock()
        self._freed = asyncio.Event()

    @asynccontextmanager
    async def taken(self, count: int) -> AsyncIterator[None]:
        """Wait for room for `count`, and take it for the length of the block."""
        async with self._turn:
            while self._left < count:
                self._freed.clear()
                await self._freed.wait()
            self._left -= count
        try:
            yield
        finally:
            self._left += count
            self._freed.set()


def watch_passes(processor: Any, scored: Mapping[str, Scored]) -> None:
    """Have the library's passes keep the scores that the sequences in `scored`, by their id, are to note."""
    runner, requests = processor.model_runner, processor.inputs_and_outputs
    compute = runner.compute_batch

    def compute_and_note(model: Any, batch: dict[str, Any]) -> None:
        rows = _rows(requests_of(requests), scored) if scored else []
        if not rows:
            compute(model, batch)
            return
        runner.supports_logits_to_keep(model)  # it remembers, and does not ask what stands for the model
        # A recorded pass does not know which scores to keep.
        recorded, runner.use_cuda_graph_varlen = runner.use_cuda_graph_varlen, False
        try:
            compute(_Noting(model, rows), batch)
        finally:
            runner.use_cuda_graph_varlen = recorded

    runner.compute_batch = compute_and_note


def _rows(requests: Sequence[Any], scored: Mapping[str, Scored]) -> list[tuple[Scored, int, range]]:
    """For each sequence with targets in a pass: its first row of the pass, and the places of its targets."""
    found, row = [], 0
    for request in requests:
        one, new = scored.get(request.state.request_id), request.query_length
        if one is not None:
            first = request.state.position_offset - new
            places = range(max(first - one.start, 0), min(first + new - one.start, len(one.targets)))
            if places:
                found.append((one, row + one.start + places.start - first, places))
        row += new
    return found


class _Noting:
    """Stands for the model in one pass."""

    def __init__(self, model: Any, rows: Sequence[tuple[Scored, int, range]]) -> None:
        self._model = model
        self._rows = rows

    def __call__(self, **batch: Any) -> Any:
        """The model's output, as if nothing had been noted."""
        rows = [row + place for _, row, places in self._rows for place in range(len(places))]
        wanted = torch.tensor(rows, dtype=torch.int32, device=batch["input_ids"].device)
        kept = batch.get("logits_to_keep")
        if kept is not None:
            batch["logits_to_keep"] = torch.cat((kept, wanted))
        output = self._model(**batch)
        scores = output.logits[0, wanted] if kept is None else output.logits[0, kept.numel() :]
        for one, _, places in self._rows:
            one.note(places, scores[: len(places)])
            scores = scores[len(places) :]
        if kept is not None:
            output.logits = output.logits[:, : kept.numel()]
        return output
