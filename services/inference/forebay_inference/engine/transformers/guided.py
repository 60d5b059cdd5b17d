"""Grammars that a sequence's tokens must follow, as masks over the vocabulary (llguidance)."""

import re
from collections.abc import Sequence
from functools import partial
from typing import Any, Final

import llguidance.hf
import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits
from llguidance.gbnf_to_lark import any_to_lark

from forebay_contracts.wire.errors import InvalidRequest
from forebay_inference.engine.protocol import EngineFault, Fault, GrammarError
from forebay_inference.engine.threads import on_deep_stack
from forebay_inference.engine.transformers.transfers import part

_SCHEMA_REASON = re.compile(r"failed to compile JSON schema: (.*?)(?:\n +\d+ \| .*)?\Z", re.DOTALL)
# An error at a place in a client's own grammar or regular expression.
_WRITTEN_REASON = re.compile(r"\A(?:at )?\d+\(\d+\): (.*)(?:[\s\S]*^error: (.*))?", re.MULTILINE)
_MAX_REASON: Final = 200
_TOO_LARGE: Final = "it is too large, or its patterns are too complex"
# 2,500 optional properties make a row of 10,000 items, which takes a tenth of a second in a step of the batch.
_LIMITS: Final = LLParserLimits(max_items_in_row=10_000, step_max_items=100_000, verbose_errors=False)
# What the library says in its own terms, and what it means for a schema.
_IN_OTHER_WORDS: Final = (
    ("recursion limit", "it is nested too deeply"),
    ("number out of range", "it has a number that is out of range"),
    ("oneOf constraints", "the alternatives of oneOf may overlap; use anyOf"),
    ("if regex is empty", "its patterns and lengths are too complex together"),
    ("does not fetch", "it refers to another document, which is not fetched"),
    ("NoExtension", "no answer can satisfy it"),
    ("ff_tokens", "what it prescribes has no end or is too long"),
    # Whatever else is found without a place in the schema is a limit that the grammar has reached.
)


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
            raise self._fault()
        return packed

    def accept(self, tokens: Sequence[int]) -> None:
        """`tokens` are the next of the sequence.

        Raises:
            EngineFault: the grammar does not allow them.
            InvalidRequest: as `allowed`.
        """
        if tokens and not self._matcher.consume_tokens(list(tokens)):
            raise self._fault()

    def _fault(self) -> Fault:
        # What the matcher says quotes schema and answer.
        if "doesn't satisfy the grammar" in self._matcher.get_error():
            return EngineFault("the tokens leave the grammar of the answer")
        return InvalidRequest(f"The schema cannot be enforced up to the end of this answer: {_TOO_LARGE}.")


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


class Grammars:
    """Compiles grammars for one model's vocabulary of `size` tokens. Thread-safe once built."""

    def __init__(self, tokenizer: Any, size: int, end_tokens: frozenset[int]) -> None:
        self.size = size
        self.vocabulary = llguidance.hf.from_tokenizer(tokenizer, n_vocab=size, eos_token=sorted(end_tokens) or None)

    def compile(self, text: str) -> Grammar:
        """The grammar written in `text`, in llguidance's dialect of Lark or in GBNF. It may take three seconds, without
        the GIL.

        Raises:
            GrammarError: it cannot be enforced.
        """
        # References of references took more than the usual 8 MB, which ended the process.
        return on_deep_stack(partial(self._compile, text))

    def _compile(self, text: str) -> Grammar:
        try:
            lark = LLMatcher.grammar_from_lark(any_to_lark(text))
        except Exception as exc:  # the library's converter raises several kinds
            raise GrammarError(str(exc)[:_MAX_REASON]) from exc
        matcher = LLMatcher(self.vocabulary, lark, log_level=0, limits=_LIMITS)
        # Some limits are reached only where the first token is to be chosen, some only behind what an answer must
        # begin with.
        first = matcher.deep_copy()
        first.compute_bitmask()
        first.try_consume_tokens(self.vocabulary.tokenize_bytes(first.compute_ff_bytes()))
        first.compute_bitmask()
        if first.is_error():
            raise GrammarError(_reason(first.get_error()))
        return Grammar(matcher)


def _reason(error: str) -> str:
    for words, meaning in _IN_OTHER_WORDS:
        if words in error:
            return meaning
    found = _SCHEMA_REASON.search(error)
    if found is None and (written := _WRITTEN_REASON.search(error)) is not None:
        return (written[2] or written[1])[:_MAX_REASON]
    return _TOO_LARGE if found is None else found[1].strip().splitlines()[-1].removeprefix("error: ")[:_MAX_REASON]
