"""Grammars that a sequence's tokens must follow, as masks over the vocabulary (llguidance)."""

import re
from collections.abc import Sequence
from typing import Any

import llguidance.hf
import numpy as np
import torch
from llguidance import LLMatcher

from forebay_inference.engine.protocol import EngineFault

_REASON = re.compile(r"failed to compile JSON schema: (.*?)(?:\n +\d+ \| .*)?\Z", re.DOTALL)


class Guide:
    """The state of one sequence in its grammar; lives on the engine's thread once it is in the batch."""

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary

    def mask(self, scores: torch.Tensor) -> None:
        """Forbid in `scores`, shape [vocabulary], every token that the grammar does not allow next, in place."""
        packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise EngineFault("the grammar of the answer failed")  # what it says quotes schema and answer
        allowed = torch.from_numpy(np.unpackbits(packed, count=self._vocabulary, bitorder="little"))
        scores.masked_fill_(allowed.to(scores.device) == 0, -torch.inf)

    def accept(self, tokens: Sequence[int]) -> None:
        """`tokens` are the next of the sequence.

        Raises:
            EngineFault: the grammar does not allow them.
        """
        if tokens and not self._matcher.consume_tokens(list(tokens)):
            raise EngineFault("the tokens leave the grammar of the answer")


class Grammars:
    """Makes guides for one model's vocabulary of `size` tokens. Thread-safe once built."""

    def __init__(self, tokenizer: Any, size: int, end_tokens: frozenset[int]) -> None:
        self.size = size
        self.vocabulary = llguidance.hf.from_tokenizer(tokenizer, n_vocab=size, eos_token=sorted(end_tokens) or None)

    def guide(self, grammar: str) -> Guide:
        """A guide at the beginning of `grammar`, written in llguidance's dialect of Lark."""
        return Guide(LLMatcher(self.vocabulary, LLMatcher.grammar_from_lark(grammar), log_level=0), self.size)

    def fault(self, grammar: str) -> str | None:
        """Why `grammar` cannot be enforced, in a line; None where it can."""
        error: str = LLMatcher.validate_grammar(LLMatcher.grammar_from_lark(grammar), self.vocabulary)
        if not error or error.startswith("WARNING"):
            return None
        found = _REASON.search(error)
        return (error if found is None else found[1]).strip().splitlines()[-1]
