"""Structured output: grammars that an answer's tokens must follow, from JSON schemas and tools.

They are written in llguidance's dialect of Lark, in which `%json` stands for the texts of a JSON schema.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from forebay_contracts.wire.errors import InvalidRequest
from forebay_inference.engine.protocol import GrammarError
from forebay_inference.engine.text.constraints import constrained, is_constraint
from forebay_inference.engine.text.schemas import enforceable
from forebay_inference.engine.text.tool_formats import ToolFormat, ToolUse

# One spelling of JSON, as `json.dumps` writes it: a small model left free loses itself in white space.
_SPELLING: Final = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_MAX_PARALLEL_CALLS: Final = 8
_ALL: Final = "all functions together"

MAX_FUNCTIONS: Final = 1_000
"""Most functions of which an answer must call one."""

FaultOf = Callable[[str], str | None]
"""Why a grammar cannot be enforced, in a line; None where it can."""


class Compiler:
    """Compiles the grammars of one request, each once. `compile_text`: see `LoadedModel.compile`."""

    def __init__(self, compile_text: Callable[[str], Any]) -> None:
        self._compile = compile_text
        self._compiled: dict[str, Any] = {}

    def fault(self, grammar: str) -> str | None:
        """Why `grammar` cannot be enforced, in a line; None where it can."""
        try:
            self._compiled[grammar] = self._compile(grammar)
        except GrammarError as exc:
            return str(exc)
        return None

    def compiled(self, grammar: str | None) -> Any:
        """`grammar` as a TokenRequest takes it, if there is one.

        Raises:
            InvalidRequest: it cannot be enforced.
        """
        if grammar is None:
            return None
        if grammar not in self._compiled and (fault := self.fault(grammar)) is not None:
            raise InvalidRequest(f"The form of the answer cannot be enforced: {fault}.", param="response_format")
        return self._compiled[grammar]


def grammar_of(
    response_format: Mapping[str, Any] | None, use: ToolUse | None, fault_of: FaultOf | None, *, closed: bool = True
) -> str | None:
    """The grammar of an answer that has `response_format` or, where `use` says so, calls tools; None for any text.

    `fault_of` is None where the engine enforces no grammar. `closed`: see `enforceable`.

    Raises:
        InvalidRequest: a schema cannot be met, or the engine cannot enforce it.
    """
    if is_constraint(response_format):
        return constrained(response_format or {}, use, fault_of)
    required = use is not None and use.required
    schema = _response_schema(response_format)
    if schema is None and not required:
        return None
    asked = str((response_format or {}).get("param", "response_format"))
    fault_of = _enforced(fault_of, "tool_choice" if schema is None else asked)
    answers = [] if schema is None else _parts([asked], [schema], asked, closed)
    if use is None:
        return _checked(f"start: {answers[0].text}", answers, fault_of)
    functions = _functions(use, closed)
    start = f"start: answer | calls\nanswer: {answers[0].text}" if answers else "start: calls"
    return _checked(f"{start}\n{_calls_rules(use, functions)}", [*answers, *functions], fault_of)


def function_grammars(use: ToolUse, fault_of: FaultOf | None, *, closed: bool) -> dict[str, str]:
    """The grammar of the arguments of each function, by its name; see `grammar_of`."""
    fault_of = _enforced(fault_of, "tool_choice")
    parts = zip(use.tools, _functions(use, closed), strict=True)
    return {tool.name: _checked(f"start: {part.text}", [part], fault_of) for tool, part in parts}


def _enforced(fault_of: FaultOf | None, param: str) -> FaultOf:
    if fault_of is None:
        raise InvalidRequest("This model's engine cannot enforce the form of an answer.", param=param)
    return fault_of


class _Part(NamedTuple):
    """A schema of a request, in llguidance's Lark, and what an error calls it."""

    text: str
    name: str
    param: str


def _parts(names: Sequence[str], schemas: Iterable[Mapping[str, Any]], param: str, closed: bool) -> list[_Part]:
    try:
        ready = enforceable(schemas, closed=closed)
    except GrammarError as exc:
        raise _refused(names[0] if len(names) == 1 else _ALL, param, str(exc)) from exc
    texts = (f"%json {json.dumps({**schema, 'x-guidance': _SPELLING})}" for schema in ready)
    return [_Part(text, name, param) for text, name in zip(texts, names, strict=True)]


def _functions(use: ToolUse, closed: bool) -> list[_Part]:
    if len(use.tools) > MAX_FUNCTIONS:
        raise InvalidRequest(f"More than {MAX_FUNCTIONS:,} functions cannot be enforced.", param="tools")
    names = [f"function {tool.name!r}" for tool in use.tools]
    return _parts(names, [tool.parameters for tool in use.tools], "tools", closed)


def _checked(grammar: str, parts: Sequence[_Part], fault_of: FaultOf) -> str:
    """`grammar`, if it can be enforced. Raises InvalidRequest that names the first part that cannot."""
    if (fault := fault_of(grammar)) is None:
        return grammar
    for part in parts:
        if own := fault if len(parts) == 1 else fault_of(f"start: {part.text}"):
            raise _refused(part.name, part.param, own)
    raise _refused(_ALL, "tools", fault)


def _refused(whose: str, param: str, fault: str) -> InvalidRequest:
    return InvalidRequest(f"The schema of {whose} cannot be enforced: {fault}.", param=param)


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


def _calls_rules(use: ToolUse, functions: Sequence[_Part]) -> str:
    """The rules of one call or, where several are allowed, up to eight, as the model family writes them.

    The schema of each of `functions` is a rule of its own, since a reference in it is from its root.
    """
    places = range(len(use.tools))
    rules = [f"calls: {_calls_rule(use.format, use.parallel)}", f"call: {' | '.join(f'call_{n}' for n in places)}"]
    for place, tool in enumerate(use.tools):
        opening = f'{{"name": {json.dumps(tool.name)}, {json.dumps(use.format.arguments_key)}: '
        rules.append(f'call_{place}: {json.dumps(opening)} arguments_{place} "}}"')
        rules.append(f"arguments_{place}: {functions[place].text}")
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
