"""Answers that follow a regular expression, a choice of texts, or a grammar that the client wrote."""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from forebay_contracts.wire.errors import InvalidRequest
from forebay_inference.engine.text.tool_formats import ToolUse

_ENDS: Final = re.compile(r"\\.|[/\n]", re.DOTALL)
_ESCAPED: Final = {"/": "\\/", "\n": "\\n", "\\\n": "\\n"}


def is_constraint(response_format: Mapping[str, Any] | None) -> bool:
    """Whether it is one of these."""
    return response_format is not None and response_format.get("type") in ("regex", "choice", "grammar")


def constrained(wanted: Mapping[str, Any], use: ToolUse | None, fault_of: Callable[[str], str | None] | None) -> str:
    """The grammar of `wanted`. For `fault_of`, see `grammar_of`.

    Raises:
        InvalidRequest: it is none, cannot be enforced, or is asked for beside tools.
    """
    param = str(wanted.get("param", "response_format"))
    if fault_of is None:
        raise InvalidRequest("This model's engine cannot enforce the form of an answer.", param=param)
    if use is not None:
        raise InvalidRequest(f"{param} cannot be combined with tools.", param=param)
    grammar = _grammar(wanted)
    if fault := fault_of(grammar):
        raise InvalidRequest(f"{param} cannot be enforced: {fault}", param=param)
    return grammar


def _grammar(wanted: Mapping[str, Any]) -> str:
    match wanted["type"]:
        case "regex":
            # Its slashes and line breaks would end it.
            pattern = _ENDS.sub(lambda found: _ESCAPED.get(found[0], found[0]), str(wanted["regex"]))
            return f"start: /{pattern}/"
        case "choice":
            texts = dict.fromkeys(wanted["choice"])
            return f"start: {' | '.join(json.dumps(text, ensure_ascii=False) for text in texts)}"
        case _:
            return str(wanted["grammar"])
