"""JSON schemas made ready for a grammar: limited in size, freed of what has no effect, and closed."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final
from urllib.parse import unquote

from forebay_inference.engine.protocol import GrammarError

MAX_SUBSCHEMAS: Final = 5_000
"""Most subschemas of one request. A grammar of so many takes up to three seconds to compile."""

MAX_MULTIPLES: Final = 100_000
"""Largest sum of all `multipleOf`, without their decimal points. The states of a grammar grow with it."""

MAX_PATTERN_CHARACTERS: Final = 30_000
"""Most characters of all patterns. A pattern of 120,000 took more than 15 s to compile."""

FORMATS: Final = frozenset(
    ("date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "unknown", "uri", "uuid")
)
"""The formats that are enforced. Any other is an annotation, as JSON Schema has it."""

# Where subschemas are: those of members and elements of a value, those of the value itself, and what is referred to.
_PARTS: Final = ("properties", "patternProperties", "items", "prefixItems", "additionalProperties", "additionalItems")
_WHOLES: Final = ("allOf", "anyOf", "oneOf")
_DEFINITIONS: Final = ("$defs", "definitions")
_OBJECTS: Final = frozenset(("properties", "patternProperties", *_DEFINITIONS))
# What says something about the names of an object.
_NAMING: Final = {"properties", "patternProperties", "additionalProperties", "required", "minProperties"}
_NO_EFFECT: Final[Mapping[str, Any]] = {
    "uniqueItems": (False,),
    "propertyNames": (True, {}, {"type": "string"}),
    "unevaluatedProperties": (True, {}),
    "unevaluatedItems": (True, {}),
}


def enforceable(schemas: Iterable[Mapping[str, Any]], *, closed: bool) -> list[dict[str, Any]]:
    """Copies of the schemas of one request, as a grammar takes them.

    With `closed`, an object has no other properties than those that its schema names, unless the schema says something
    about `additionalProperties`. An object that several schemas describe together stays open: closed to the names of
    one, it could not have those of another.

    Raises:
        GrammarError: they are too large to be enforced.
    """
    copies: list[dict[str, Any]] = [json.loads(json.dumps(schema)) for schema in schemas]
    subschemas = multiples = characters = 0
    for copy in copies:
        for node in _walk(copy):
            subschemas += 1 + _further(node)
            multiples += _digits(node.get("multipleOf"))
            characters += _pattern_characters(node)
            if subschemas > MAX_SUBSCHEMAS:
                raise GrammarError(f"more than {MAX_SUBSCHEMAS:,} subschemas")
            if multiples > MAX_MULTIPLES:
                raise GrammarError(f"the sum of all `multipleOf` is more than {MAX_MULTIPLES:,}")
            if characters > MAX_PATTERN_CHARACTERS:
                raise GrammarError(f"its patterns have more than {MAX_PATTERN_CHARACTERS:,} characters")
            _drop_what_has_no_effect(node)
        if closed:
            _close(copy)
    return copies


def _walk(root: Any) -> Iterator[dict[str, Any]]:
    """Every subschema, the root first."""
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            yield node
            waiting += _children(node, (*_PARTS, *_WHOLES, *_DEFINITIONS))


def _children(node: dict[str, Any], keys: Iterable[str]) -> Iterator[Any]:
    """The subschemas that stand directly in `node` under `keys`, and what stands there in their place."""
    for key in keys:
        match node.get(key):
            case dict() as members if key in _OBJECTS:
                yield from members.values()
            case list() as several:
                yield from several
            case dict() as one:
                yield one


def _further(node: dict[str, Any]) -> int:
    """What a grammar makes a subschema of besides: names that are only required, and the parts of constant values."""
    named, required = node.get("properties"), node.get("required")
    names = max(0, len(required) - (len(named) if isinstance(named, dict) else 0)) if isinstance(required, list) else 0
    values = node.get("enum")
    waiting = [node.get("const"), *(values if isinstance(values, list) else ())]
    parts = 0
    while waiting:
        value = waiting.pop()
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        waiting += inner
        parts += len(inner)
    return names + parts


def _pattern_characters(node: dict[str, Any]) -> int:
    properties = node.get("patternProperties")
    patterns = [node.get("pattern"), *(properties if isinstance(properties, dict) else ())]
    return sum(len(pattern) for pattern in patterns if isinstance(pattern, str))


def _digits(multiple: Any) -> int:
    """The digits of a number as an integer: 0.25 has 25."""
    match multiple:
        case int():
            return abs(multiple)
        case float() if multiple.is_integer():
            return int(abs(multiple))
        case float() if math.isfinite(multiple):
            return int(repr(abs(multiple)).partition("e")[0].replace(".", ""))
    return 0


def _drop_what_has_no_effect(node: dict[str, Any]) -> None:
    for key, values in _NO_EFFECT.items():
        if key in node and node[key] in values:
            del node[key]
    if isinstance(form := node.get("format"), str) and form not in FORMATS:
        del node["format"]


def _close(root: dict[str, Any]) -> None:
    """Forbid further properties in every object that one schema alone describes. Follows references."""
    alone: dict[int, dict[str, Any]] = {}
    combined: set[int] = set()
    seen: set[tuple[int, bool]] = set()
    waiting: list[tuple[Any, bool]] = [(root, False)]
    while waiting:
        node, beside_others = waiting.pop()
        if not isinstance(node, dict) or (id(node), beside_others) in seen:
            continue
        seen.add((id(node), beside_others))
        same = [*_children(node, _WHOLES), *_referred(root, node)]
        sources = len([*_children(node, ("allOf",))]) + sum(key in node for key in ("anyOf", "oneOf", "$ref"))
        names = not _NAMING.isdisjoint(node)
        beside_others |= names and sources > 0
        if beside_others:
            combined.add(id(node))
        elif _can_be_closed(node):
            alone[id(node)] = node
        waiting += [(other, beside_others or sources > 1) for other in same]
        waiting += [(part, beside_others) for part in _children(node, _PARTS)]
    for place in alone.keys() - combined:
        alone[place]["additionalProperties"] = False


def _can_be_closed(node: dict[str, Any]) -> bool:
    if node.keys() & {"additionalProperties", "unevaluatedProperties", "minProperties"}:
        return False
    named, required = node.get("properties", {}), node.get("required", [])
    if not isinstance(named, dict) or not isinstance(required, list):
        return False
    return bool(node.keys() & {"properties", "patternProperties"}) and all(str(name) in named for name in required)


def _referred(root: dict[str, Any], node: dict[str, Any]) -> list[Any]:
    """What `$ref` points at, if that is a place in this schema."""
    reference = node.get("$ref")
    if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
        return []
    found: Any = root
    for step in unquote(reference).split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list):
            found = found[int(step)] if step.isdecimal() and int(step) < len(found) else None
        else:
            found = found.get(step) if isinstance(found, dict) else None
    return [found]
