"""Structured output: grammars that an answer's tokens must follow, from JSON schemas and tools.

They are written in llguidance's dialect of Lark, in which `%json` stands for the texts of a JSON schema.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, Final

from forebay_contracts.wire.errors import InvalidRequest
from forebay_inference.engine.text.tool_formats import ToolFormat, ToolUse

# One spelling of JSON, as `json.dumps` writes it: a small model left free loses itself in white space.
_SPELLING: Final = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_MAX_PARALLEL_CALLS: Final = 8


def grammar_of(
    response_format: Mapping[str, Any] | None, use: ToolUse | None, fault_of: Callable[[str], str | None] | None
) -> str | None:
    """The grammar of an answer that has `response_format` or, where `use` says so, calls tools; None for any text.

    `fault_of` tells why a grammar cannot be enforced; None where the engine enforces none at all.

    Raises:
        InvalidRequest: a schema cannot be met, or the engine cannot enforce it.
    """
    required = use is not None and use.required
    schema = _response_schema(response_format)
    if schema is None and not required:
        return None
    if fault_of is None:
        asked = "tool_choice" if schema is None else "response_format"
        raise InvalidRequest("This model's engine cannot enforce the form of an answer.", param=asked)

    def checked(grammar: str, param: str) -> str:
        if fault := fault_of(grammar):
            raise InvalidRequest(f"The schema cannot be enforced: {fault}", param=param)
        return grammar

    answer = "" if schema is None else checked(f"start: {_json(schema)}", "response_format")
    if use is None:
        return answer
    for tool in use.tools:
        checked(f"start: {_json(tool.parameters)}", "tools")
    calls = _calls_rules(use)
    if required:
        return checked(f"start: calls\n{calls}", "tool_choice")
    return checked(f"start: answer | calls\n{answer.replace('start', 'answer', 1)}\n{calls}", "tools")


def _response_schema(response_format: Mapping[str, Any] | None) -> dict[str, Any] | None:
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


def _json(schema: Mapping[str, Any]) -> str:
    return f"%json {json.dumps({**schema, 'x-guidance': _SPELLING})}"


def _calls_rules(use: ToolUse) -> str:
    """The rules of one call or, where several are allowed, up to eight, as the model family writes them.

    Each tool's schema is a rule of its own, since a reference in it is from its root.
    """
    places = range(len(use.tools))
    rules = [f"calls: {_calls_rule(use.format, use.parallel)}", f"call: {' | '.join(f'call_{n}' for n in places)}"]
    for place, tool in enumerate(use.tools):
        opening = f'{{"name": {json.dumps(tool.name)}, {json.dumps(use.format.arguments_key)}: '
        rules.append(f'call_{place}: {json.dumps(opening)} arguments_{place} "}}"')
        rules.append(f"arguments_{place}: {_json(tool.parameters)}")
    return "\n".join(rules)


def _calls_rule(form: ToolFormat, parallel: bool) -> str:
    start = f"<[{form.start_token}]>" if form.start_token is not None else json.dumps(form.start)

    def repeated(one: str, separator: str) -> str:
        return f"{one} ({json.dumps(separator)} {one}){{0,{_MAX_PARALLEL_CALLS - 1}}}" if parallel else one

    if form.end:
        opening, closing = json.dumps("\n"), json.dumps("\n" + form.end)
        return repeated(f"{start} {opening} call {closing}", "\n")
    if form.bracketed:
        return f'{start} "[" {repeated("call", ", ")} "]"'
    return repeated("call", "; ")
