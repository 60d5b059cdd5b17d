"""Structured output: grammars that a sequence's tokens must follow, from JSON schemas and tools (llguidance)."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import llguidance.hf
import numpy as np
import torch
from llguidance import LLMatcher

from forebay_contracts.wire.errors import InvalidRequest
from forebay_inference.engine.protocol import EngineFault
from forebay_inference.engine.text.tool_formats import ToolFormat, ToolUse

# One spelling of JSON, as `json.dumps` writes it: a small model left free loses itself in white space.
_SPELLING: Final = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_MAX_PARALLEL_CALLS: Final = 8


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
        self._size = size
        self._vocabulary = llguidance.hf.from_tokenizer(tokenizer, n_vocab=size, eos_token=sorted(end_tokens) or None)

    def bytes_of(self, token: int) -> bytes:
        """The bytes of one token, which need not be whole characters."""
        return bytes(self._vocabulary.decode_bytes([token]))

    def guide(self, grammar: str) -> Guide:
        """A guide at the beginning of a grammar that `grammar` made."""
        return Guide(LLMatcher(self._vocabulary, grammar, log_level=0), self._size)

    def grammar(self, response_format: Mapping[str, Any] | None, use: ToolUse | None) -> str | None:
        """The grammar of an answer that has `response_format` or, where `use` says so, calls tools; None for any text.

        Raises:
            InvalidRequest: a schema cannot be met, or uses what the grammar library cannot enforce.
        """
        schema = _response_schema(response_format)
        if schema is not None:
            self._check(_json_grammar(schema), "response_format")
        if use is None or not use.required:
            if schema is None:
                return None
            if use is None:
                return _json_grammar(schema)
        parts = [] if schema is None or use.required else ["answer"]
        lines = []
        if schema is not None and not use.required:
            lines.append(f"answer: %json {json.dumps(_spelled(schema))}")
        for tool in use.tools:
            self._check(_json_grammar(tool.parameters), "tools")
        lines.append(f"call: %json {json.dumps(_spelled(_call_schema(use)))}")
        lines.append(f"calls: {_calls_rule(use.format, use.parallel)}")
        parts.append("calls")
        grammar = "\n".join([f"start: {' | '.join(parts)}", *lines])
        self._check(LLMatcher.grammar_from_lark(grammar), "tools")
        return str(LLMatcher.grammar_from_lark(grammar))

    def _check(self, grammar: str, param: str) -> None:
        error = LLMatcher.validate_grammar(grammar, self._vocabulary)
        if error and not error.startswith("WARNING"):
            raise InvalidRequest(f"The schema cannot be enforced: {error.splitlines()[-1]}", param=param)


def _response_schema(response_format: Mapping[str, Any] | None) -> Any:
    """The JSON schema that `response_format` asks for, None for any text."""
    match (response_format or {}).get("type", "text"):
        case "text":
            return None
        case "json_object":
            return {"type": "object"}
        case "json_schema":
            wanted = (response_format or {}).get("json_schema")
            schema = wanted.get("schema") if isinstance(wanted, Mapping) else None
            if not isinstance(schema, Mapping):
                raise InvalidRequest("json_schema needs an object `schema`.", param="response_format")
            return dict(schema)
        case other:
            raise InvalidRequest(f"Unknown response_format type {other!r}.", param="response_format")


def _spelled(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {**schema, "x-guidance": _SPELLING}


def _json_grammar(schema: Mapping[str, Any]) -> str:
    return str(LLMatcher.grammar_from_json_schema(json.dumps(_spelled(schema))))


def _call_schema(use: ToolUse) -> dict[str, Any]:
    calls = []
    definitions: dict[str, Any] = {}
    for tool in use.tools:
        # References in a tool's schema are from its root, which is no longer the root here.
        definitions.update(tool.parameters.get("$defs", {}))
        parameters = {key: value for key, value in tool.parameters.items() if key != "$defs"}
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": tool.name}, use.format.arguments_key: parameters},
                "required": ["name", use.format.arguments_key],
                "additionalProperties": False,
            }
        )
    return {"anyOf": calls, **({"$defs": definitions} if definitions else {})}


def _calls_rule(form: ToolFormat, parallel: bool) -> str:
    """The grammar rule of one call or, if `parallel`, several, as the model family writes them."""
    start = f"<[{form.start_token}]>" if form.start_token is not None else json.dumps(form.start)

    def repeated(one: str, separator: str) -> str:
        return f"{one} ({json.dumps(separator)} {one}){{0,{_MAX_PARALLEL_CALLS - 1}}}" if parallel else one

    if form.end:
        opening, closing = json.dumps("\n"), json.dumps("\n" + form.end)
        return repeated(f"{start} {opening} call {closing}", "\n")
    if form.bracketed:
        return f'{start} "[" {repeated("call", ", ")} "]"'
    return repeated("call", "; ")
