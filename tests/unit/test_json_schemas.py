"""What of JSON Schema is enforced: the tables of docs/engine.md, each row with values that it allows and forbids."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from forebay_contracts.wire.errors import InvalidRequest
from forebay_contracts.wire.request import Sampling
from forebay_inference.engine.protocol import EngineFault, TokenRequest
from forebay_inference.engine.text.grammars import MAX_FUNCTIONS, Compiler, grammar_of
from forebay_inference.engine.text.schemas import FORMATS, MAX_MULTIPLES, MAX_PATTERN_CHARACTERS, MAX_SUBSCHEMAS
from forebay_inference.engine.text.tool_formats import HERMES, LLAMA, MISTRAL, ToolFormat, ToolUse, tool_use
from forebay_inference.engine.transformers.guided import Grammars
from forebay_inference.engine.transformers.penalties import Histories
from forebay_inference.engine.transformers.sampling import Row, TokenChooser, choose
from support.checkpoint import END, byte_tokenizer
from support.engine import chat

PAGE = (Path(__file__).parents[2] / "docs" / "engine.md").read_text()
TOKENIZER = byte_tokenizer()
GRAMMARS = Grammars(TOKENIZER, len(TOKENIZER), frozenset({TOKENIZER.eos_token_id}))
Values = list[Any]


def table(heading: str) -> list[list[str]]:
    """The rows of the first table below `heading`, without its head."""
    lines = PAGE.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0].splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def names(cell: str) -> list[str]:
    return [name.replace("\\|", "|") for name in re.findall(r"`([^`]+)`", cell)]


def obj(*required: str, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, **({"required": list(required)} if required else {})}


def compiled(response_format: Any, use: ToolUse | None, closed: bool = True) -> Any:
    compiler = Compiler(GRAMMARS.compile)
    return compiler.compiled(grammar_of(response_format, use, compiler.fault, closed=closed))


def response(schema: Any, *, closed: bool = True) -> Any:
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    return compiled(form, None, closed)


def allowed(grammar: Any, value: Any) -> bool:
    """Whether `value` is a whole answer under `grammar`."""
    try:
        grammar.guide().accept(TOKENIZER.encode(json.dumps(value, ensure_ascii=False) + END))
    except EngineFault:
        return False
    return True


STRING = {"type": "string"}
INTEGER = {"type": "integer"}
# For each keyword a schema, what it allows, and what only the keyword forbids.
ENFORCED: dict[str, tuple[Any, Values, Values]] = {
    "type": ({"type": ["string", "null"]}, ["a", None], [1]),
    "format": ({"type": "string", "format": "ipv4"}, ["127.0.0.1"], ["127"]),
    "enum": ({"enum": ["é", 1, {"a": [2]}]}, ["é", 1, {"a": [2]}], ["e", 2, {"a": [1]}]),
    "const": ({"const": {"a": 1}}, [{"a": 1}], [{"a": 2}]),
    "properties": (obj(a=INTEGER), [{"a": 1}], [{"a": "x"}]),
    "required": (obj("a", a={}), [{"a": 1}], [{}]),
    "additionalProperties": (obj(a={}) | {"additionalProperties": INTEGER}, [{"a": 1, "b": 2}], [{"b": "x"}]),
    "patternProperties": ({"type": "object", "patternProperties": {"^n_": INTEGER}}, [{"n_a": 1}], [{"n_a": "x"}]),
    "items": ({"type": "array", "items": INTEGER}, [[], [1, 2]], [["a"]]),
    "prefixItems": ({"type": "array", "prefixItems": [STRING]}, [["a"], ["a", 1]], [[1]]),
    "minItems": ({"type": "array", "items": INTEGER, "minItems": 2}, [[1, 2]], [[1]]),
    "maxItems": ({"type": "array", "items": INTEGER, "maxItems": 1}, [[1]], [[1, 2]]),
    "minLength": ({"type": "string", "minLength": 2}, ["ab"], ["a"]),
    "maxLength": ({"type": "string", "maxLength": 2}, ["ab"], ["abc"]),
    "pattern": ({"type": "string", "pattern": "^a+b?$"}, ["aab"], ["b"]),
    "minimum": ({"type": "integer", "minimum": 3}, [3], [2]),
    "maximum": ({"type": "integer", "maximum": 3}, [3], [4]),
    "exclusiveMinimum": ({"type": "integer", "exclusiveMinimum": 3}, [4], [3]),
    "exclusiveMaximum": ({"type": "integer", "exclusiveMaximum": 3}, [2], [3]),
    "multipleOf": ({"type": "number", "multipleOf": 0.1}, [0.5, 1], [0.35]),
    "anyOf": ({"anyOf": [INTEGER, STRING]}, [1, "a"], [None]),
    "oneOf": ({"oneOf": [INTEGER, STRING]}, [1, "a"], [None]),
    "allOf": ({"allOf": [{"type": "string", "minLength": 2}, {"maxLength": 3}]}, ["ab"], ["a", "abcd"]),
    "$ref": ({"$ref": "#/$defs/a~1b", "$defs": {"a/b": INTEGER}}, [1], ["a"]),
    "minProperties": (
        obj("a", a={}) | {"additionalProperties": True, "minProperties": 2},
        [{"a": 1, "b": 2}],
        [{"a": 1}],
    ),
    "maxProperties": (
        obj("a", a={}) | {"additionalProperties": True, "maxProperties": 1},
        [{"a": 1}],
        [{"a": 1, "b": 2}],
    ),
}
ANNOTATIONS: dict[str, Any] = {
    "title": "a",
    "description": "a",
    "default": 1,
    "examples": [1],
    "deprecated": True,
    "readOnly": True,
    "writeOnly": True,
    "$schema": "http://json-schema.org/draft-07/schema#",
    "$id": "https://example.com/a",
    "$comment": "a",
    "$anchor": "a",
    "contentEncoding": "base64",
    "contentMediaType": "text/plain",
    "nullable": True,
    "discriminator": {"propertyName": "a"},
    "x-order": 1,
}
REFUSED: dict[str, Any] = {
    "not": {"type": "null"},
    "if": {"type": "string"},
    "then": {},
    "else": {},
    "dependentRequired": {"a": ["b"]},
    "dependentSchemas": {"a": {}},
    "dependencies": {"a": ["b"]},
    "uniqueItems": True,
    "contains": {"type": "null"},
    "minContains": 1,
    "maxContains": 1,
    "propertyNames": {"maxLength": 3},
    "unevaluatedProperties": False,
    "unevaluatedItems": False,
    "$dynamicRef": "#a",
    "$recursiveRef": "#",
}
FATES = {"enforced": ENFORCED, "no effect": ANNOTATIONS, "refused": REFUSED}
FORMAT_VALUES = {
    "date": ("2026-11-29", "29.11.2026"),
    "date-time": ("2026-11-29T21:00:00Z", "2026-11-29"),
    "duration": ("P1DT2H", "2h"),
    "email": ("a@example.com", "a"),
    "hostname": ("example.com", "-"),
    "ipv4": ("127.0.0.1", "127.0.0"),
    "ipv6": ("::1", "1"),
    "time": ("21:00:00Z", "9pm"),
    "unknown": ("anything", None),
    "uri": ("https://example.com/a", "a b"),
    "uuid": ("12345678-1234-5678-9abc-123456789abc", "12345678"),
}


@pytest.mark.parametrize("fate", FATES)
def test_the_table_of_keywords_is_what_is_tested(fate: str) -> None:
    told = [name for cell, what, *_ in table("Schemas") if what == fate for name in names(cell)]
    assert sorted(told) == sorted(FATES[fate])


@pytest.mark.parametrize("keyword", ENFORCED)
def test_what_is_enforced(keyword: str) -> None:
    schema, right, wrong = ENFORCED[keyword]
    grammar = response(schema, closed=False)
    assert [value for value in right if not allowed(grammar, value)] == []
    assert [value for value in wrong if allowed(grammar, value)] == []
    without = response({key: value for key, value in schema.items() if key != keyword}, closed=False)
    assert [value for value in wrong if not allowed(without, value)] == []


@pytest.mark.parametrize("keyword", ANNOTATIONS)
def test_what_has_no_effect(keyword: str) -> None:
    grammar = response(INTEGER | {keyword: ANNOTATIONS[keyword]})
    assert allowed(grammar, 5)
    assert not allowed(grammar, "a")


@pytest.mark.parametrize("keyword", REFUSED)
def test_what_is_refused_by_name(keyword: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(keyword)) as refused:
        response({keyword: REFUSED[keyword]})
    assert refused.value.param == "response_format"


def test_formats() -> None:
    (told,) = [names(note) for cell, _, note in table("Schemas") if names(cell) == ["format"]]
    assert sorted(told) == sorted(FORMATS) == sorted(FORMAT_VALUES)
    for form, (right, wrong) in FORMAT_VALUES.items():
        grammar = response({"type": "string", "format": form})
        assert (allowed(grammar, right), wrong is None or not allowed(grammar, wrong)) == (True, True), form
    for form in ("binary", "int64", "password", "file-path", "uri-reference", "json-pointer", "nonsense"):
        assert allowed(response({"type": "string", "format": form}), "a b"), form


@pytest.mark.parametrize(
    "harmless",
    [{"uniqueItems": False}, {"propertyNames": {"type": "string"}}, {"propertyNames": {}}, {"unevaluatedItems": True}],
)
def test_what_forbids_nothing_is_not_refused(harmless: dict[str, Any]) -> None:
    assert allowed(response(harmless), {"a": 1})


OPEN = obj(b=INTEGER)
CAT = obj("kind", kind={"const": "cat"}, lives=INTEGER)
DOG = obj("kind", kind={"const": "dog"}, breed=STRING)
TREE = obj("left", left={"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]})


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        (obj(a=INTEGER), [{}, {"a": 1}], [{"b": 1}, {"a": 1, "b": 1}]),
        (obj(), [{}], [{"a": 1}]),
        ({"properties": {"a": INTEGER}}, [{"a": 1}, "not an object"], [{"b": 1}]),
        ({"type": "object"}, [{"a": 1}], []),
        ({}, [{"a": 1}], []),
        (obj(a=INTEGER) | {"additionalProperties": True}, [{"b": 1}], []),
        (obj(a=INTEGER) | {"additionalProperties": {}}, [{"b": "x"}], []),
        (obj(a=INTEGER) | {"additionalProperties": STRING}, [{"b": "x"}], [{"b": 1}]),
        (obj(a=INTEGER) | {"additionalProperties": False}, [{"a": 1}], [{"b": 1}]),
        ({"type": "object", "patternProperties": {"^n_": INTEGER}}, [{"n_a": 1}], [{"a": 1}]),
        (obj(a=OPEN), [{"a": {"b": 1}}], [{"a": {"c": 1}}]),
        ({"type": "array", "items": OPEN}, [[{"b": 1}]], [[{"c": 1}]]),
        ({"type": "array", "prefixItems": [OPEN]}, [[{"b": 1}]], [[{"c": 1}]]),
        (obj(a={"type": "object", "additionalProperties": OPEN}), [{"a": {"x": {"b": 1}}}], [{"a": {"x": {"c": 1}}}]),
        (obj(a={"$ref": "#/$defs/o"}) | {"$defs": {"o": OPEN}}, [{"a": {"b": 1}}], [{"a": {"c": 1}}]),
        ({"$ref": "#/definitions/a%20b", "definitions": {"a b": OPEN}}, [{"b": 1}], [{"c": 1}]),
        (
            {"$ref": "#/$defs/tree", "$defs": {"tree": TREE}},
            [{"left": {"left": None}}],
            [{"left": {"left": None, "x": 1}}],
        ),
        ({"anyOf": [OPEN, {"type": "null"}]}, [{"b": 1}, None], [{"c": 1}]),
        (
            {"oneOf": [CAT, DOG]},
            [{"kind": "dog", "breed": "b"}],
            [{"kind": "dog", "lives": 9}, {"kind": "cat", "x": 1}],
        ),
        ({"allOf": [{"$ref": "#/$defs/o"}], "$defs": {"o": OPEN}}, [{"b": 1}], [{"c": 1}]),
        # Several schemas describe one object, so that each must leave it open to the names of the others.
        ({"allOf": [OPEN, obj("c", c=STRING)]}, [{"b": 1, "c": "x"}], [{"c": 1}]),
        (
            {"allOf": [{"$ref": "#/$defs/o"}, obj("c", c=STRING)], "$defs": {"o": OPEN}},
            [{"b": 1, "c": "x"}],
            [{"b": "x"}],
        ),
        (obj("a", a=STRING) | {"anyOf": [obj("b", b=INTEGER), obj("c", c=INTEGER)]}, [{"a": "x", "c": 1}], [{"a": 1}]),
        (
            obj("a", a=STRING) | {"$ref": "#/$defs/o", "$defs": {"o": OPEN}},
            [{"a": "x", "b": 1}],
            [{"a": "x", "b": "x"}],
        ),
        (
            {"allOf": [obj("a", a=obj("b", b=INTEGER)), obj("a", a=obj("c", c=INTEGER))]},
            [{"a": {"b": 1, "c": 2}}],
            [{"a": {"b": 1}}],
        ),
        # Closed, they could not be met.
        (obj("z", a=INTEGER), [{"z": 1}], [{}]),
        ({"required": ["z"], "anyOf": [OPEN, obj(c=STRING)]}, [{"z": 1}], [{}]),
        (obj("a", a={}) | {"minProperties": 2}, [{"a": 1, "b": 1}], [{"a": 1}]),
        # These are values and no schemas.
        (
            obj("a", a={"const": {"properties": {"a": 1}, "format": "x"}}),
            [{"a": {"properties": {"a": 1}, "format": "x"}}],
            [],
        ),
        (obj(properties=obj(format=STRING)), [{"properties": {"format": "x"}}], [{"properties": {"b": 1}}]),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_objects_are_closed_where_one_schema_alone_describes_them(
    schema: dict[str, Any], right: Values, wrong: Values
) -> None:
    given = json.dumps(schema)
    grammar = response(schema)
    assert [value for value in right if not allowed(grammar, value)] == []
    assert [value for value in wrong if allowed(grammar, value)] == []
    assert json.dumps(schema) == given


def test_objects_stay_open_without_the_setting() -> None:
    assert allowed(response(obj(a=INTEGER), closed=False), {"b": "anything"})


def called(form: ToolFormat, *tools: dict[str, Any], closed: bool = True, **fields: Any) -> Any:
    given = tuple({"type": "function", "function": tool} for tool in tools)
    request = chat(tools=given, tool_choice="required", **fields)
    return compiled(request.response_format, tool_use(request, form), closed)


def test_arguments_are_closed_too() -> None:
    def follows(grammar: Any, arguments: dict[str, Any]) -> bool:
        text = json.dumps({"name": "f", LLAMA.arguments_key: arguments})
        try:
            grammar.guide().accept(TOKENIZER.encode(text))
        except EngineFault:
            return False
        return True

    grammar = called(LLAMA, {"name": "f", "parameters": obj(a=INTEGER)})
    assert (follows(grammar, {"a": 1}), follows(grammar, {"b": 1})) == (True, False)
    opened = called(LLAMA, {"name": "f", "parameters": obj(a=INTEGER)}, closed=False)
    assert follows(opened, {"b": 1})


def chained(number: int) -> dict[str, Any]:
    return {"anyOf": [{"$ref": f"#/$defs/n{number}"}, {"type": "null"}]}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = STRING
    for _ in range(depth):
        schema = obj("a", a=schema)
    return schema


LIMITED: list[tuple[str, Any, str]] = [
    ("subschemas", obj(**{f"p{number}": {} for number in range(MAX_SUBSCHEMAS)}), "more than 5,000 subschemas"),
    ("required names", {"type": "object", "required": [f"p{n}" for n in range(40_000)]}, "more than 5,000 subschemas"),
    ("a constant", {"const": {f"k{n}": [n] for n in range(20_000)}}, "more than 5,000 subschemas"),
    ("constants", {"enum": [[[n]] for n in range(10_000)]}, "more than 5,000 subschemas"),
    ("a long pattern", {"type": "string", "pattern": "(a|b*)" * 20_000}, "patterns have more than 30,000 characters"),
    ("multiples", {"type": "integer", "multipleOf": 982451653}, "`multipleOf` is more than 100,000"),
    (
        "multiples together",
        obj(**{f"p{n}": {"multipleOf": 10.01 + n} for n in range(200)}),
        "`multipleOf` is more than",
    ),
    ("a huge multiple", {"type": "integer", "multipleOf": 10**400}, "`multipleOf` is more than"),
    ("nesting", nested(100), "nested too deeply"),
    ("optional properties", obj(**{f"p{n}": {} for n in range(2_600)}), "too large"),
    (
        "combinations",
        {"allOf": [{"anyOf": [obj(f"k{n}", **{f"k{n}": {"const": m}}) for m in range(4)]} for n in range(8)]},
        "schema too large",
    ),
    (
        "a hard pattern",
        {"type": "string", "pattern": "^([a-z]{1,3}[0-9]){1,50}$", "maxLength": 2000, "minLength": 99},
        "too complex",
    ),
    ("a look-ahead", {"type": "string", "pattern": "^(?=a)"}, "look-ahead"),
    ("a broken pattern", {"type": "string", "pattern": "("}, "unclosed group"),
    ("a back reference", {"type": "string", "pattern": r"(a)\1"}, "backreferences"),
    ("overlapping oneOf", {"oneOf": [{"type": "number"}, INTEGER]}, "alternatives of oneOf may overlap"),
    ("an empty enum", {"enum": []}, "Unsatisfiable"),
    ("a contradiction", {"type": "integer", "minimum": 5, "maximum": 1}, r"minimum \(5\) is greater than maximum"),
    ("a reference to itself", {"$ref": "#"}, "no answer can satisfy it"),
    (
        "a cycle of references",
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
        "no answer",
    ),
    ("an endless object", obj("a", a={"$ref": "#"}), "has no end"),
    ("a long reference", {"$ref": "#/" + "x" * 100_000}, "Pointer '/xxx"),
    ("overlapping patterns", {"type": "object", "patternProperties": {f"^p{n}.*a": {} for n in range(300)}}, "pattern"),
    ("a missing reference", {"$ref": "#/$defs/x"}, "'/\\$defs/x' does not exist"),
    ("a remote reference", {"$ref": "https://example.com/s.json"}, "not fetched"),
    ("a number out of range", {"type": "integer", "maximum": 10**400}, "out of range"),
    ("a length that is no number", {"type": "string", "maxLength": "5"}, "maxLength"),
    ("properties that are none", {"type": "object", "properties": [1]}, "properties must be an object"),
    ("a schema that is none", obj(a=5), "schema must be an object or boolean"),
    ("names that are none", {"type": "object", "required": [{}]}, "required"),
]


@pytest.mark.parametrize(("schema", "reason"), [row[1:] for row in LIMITED], ids=[row[0] for row in LIMITED])
def test_what_cannot_be_enforced_is_refused_in_the_schema_s_own_terms(schema: dict[str, Any], reason: str) -> None:
    began = time.process_time()
    with pytest.raises(InvalidRequest, match=f"^The schema of response_format cannot be enforced: .*{reason}") as told:
        response(schema)
    assert time.process_time() - began < 3
    assert len(told.value.message) < 300
    for ours in ("start:", "%json", "x-guidance", "grammar", "panic", "\n"):
        assert ours not in told.value.message
    tool = {"name": "get_it", "parameters": schema}
    with pytest.raises(
        InvalidRequest, match=f"^The schema of function 'get_it' cannot be enforced: .*{reason}"
    ) as told:
        called(HERMES, tool)
    assert told.value.param == "tools"


@pytest.mark.parametrize(
    "schema",
    [
        obj(**{f"p{number}": STRING for number in range(1_000)}),
        obj(*(f"p{n}" for n in range(1_000)), **{f"p{n}": INTEGER for n in range(1_000)}),
        {"type": "integer", "multipleOf": 86_400},
        {"enum": [f"value {number}" for number in range(5_000)]},
        {"type": "array", "items": INTEGER, "minItems": 10**9},
        {"type": "string", "maxLength": 10**9},
        {"type": "string", "pattern": "((a{1,100}){1,100}){1,100}"},
        nested(30),
        {"$ref": "#/$defs/n0", "$defs": {f"n{n}": chained(n + 1) for n in range(1_500)} | {"n1500": STRING}},
    ],
    ids=["optional", "required", "multiple", "enum", "items", "length", "pattern", "depth", "references"],
)
def test_what_is_large_is_enforced(schema: dict[str, Any]) -> None:
    assert response(schema) is not None


def test_many_functions() -> None:
    def tools(count: int, **properties: Any) -> list[dict[str, Any]]:
        return [{"name": f"f{number}", "parameters": obj(**properties)} for number in range(count)]

    assert called(HERMES, *tools(500, a=STRING, b=INTEGER)) is not None
    with pytest.raises(InvalidRequest, match="More than 1,000 functions") as told:
        called(HERMES, *tools(MAX_FUNCTIONS + 1))
    assert told.value.param == "tools"
    with pytest.raises(InvalidRequest, match="all functions together cannot be enforced: more than 5,000"):
        called(HERMES, *tools(900, **{f"p{number}": STRING for number in range(6)}))


def test_a_grammar_that_grows_too_large_ends_the_request_and_not_the_engine() -> None:
    grammar = response({"type": "string", "pattern": "(.*a.{1000})"})
    guide = grammar.guide()
    with pytest.raises(InvalidRequest, match="cannot be enforced up to the end of this answer") as told:
        guide.accept(TOKENIZER.encode('"' + "ab" * 400))
    assert "abab" not in told.value.message
    # In the batch, it is the fault of this sequence alone, and no fault of the engine.
    chooser, device = TokenChooser(TokenRequest("r", (), 1, Sampling()), guide), torch.device("cpu")
    choose([Row(0, chooser, 0)], torch.zeros(1, GRAMMARS.size), Histories(GRAMMARS.size, device))
    assert isinstance(chooser.outcome(0), InvalidRequest)


def test_the_limits_are_in_the_docs() -> None:
    section = PAGE.split("## Schemas\n", 1)[1].split("\n## ", 1)[0]
    for limit in (MAX_SUBSCHEMAS, MAX_PATTERN_CHARACTERS, MAX_MULTIPLES, MAX_FUNCTIONS):
        assert f"{limit:,}" in section


def test_the_table_of_tool_formats_is_what_is_served() -> None:
    told = {name: (names(example)[0], names(key)[0]) for name, example, key, *_ in table("Tool formats")}
    forms = {"Hermes": HERMES, "Mistral": MISTRAL, "Llama 3": LLAMA}
    assert told == {name: (form.start, form.arguments_key) for name, form in forms.items()}
