"""Tools: which ones a request allows, how prompts describe them, and how model families write calls."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from forebay_contracts.wire.errors import InvalidRequest
from forebay_contracts.wire.request import InferenceRequest
from forebay_inference.engine.protocol import Tokenizer


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a model family writes calls: `start`, JSON objects with `name` and `arguments_key`, then `end`.

    `start_token` is set where the marker is a special token of the vocabulary. `bare`: a call may begin with
    its brace alone. `bracketed`: the objects stand in a JSON list.
    """

    start: str
    end: str
    arguments_key: str
    bracketed: bool = False
    bare: bool = False
    start_token: int | None = None
    in_template: bool = True


HERMES: Final = ToolFormat("<tool_call>", "</tool_call>", "arguments")
MISTRAL: Final = ToolFormat("[TOOL_CALLS]", "", "arguments", bracketed=True)
LLAMA: Final = ToolFormat("<|python_tag|>", "", "parameters", bare=True)


def format_of(tokenizer: Tokenizer) -> ToolFormat:
    """The format of the model's family, told by its chat template; Hermes where the template knows no tools."""
    template = tokenizer.chat_template or ""
    knows_tools = "tools" in template
    form = HERMES
    if "[TOOL_CALLS]" in template:
        form = MISTRAL
    elif knows_tools and "<tool_call>" not in template and ("<|python_tag|>" in template or '"parameters"' in template):
        form = LLAMA
    return replace(form, start_token=tokenizer.special_tokens.get(form.start), in_template=knows_tools)


@dataclass(frozen=True, slots=True)
class Tool:
    """One function that the model may call."""

    name: str
    parameters: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools that one request allows. `required`: the answer is a call and nothing else."""

    format: ToolFormat
    tools: tuple[Tool, ...]
    required: bool
    parallel: bool

    @property
    def names(self) -> frozenset[str]:
        """The names of the tools."""
        return frozenset(tool.name for tool in self.tools)


def tool_use(request: InferenceRequest, form: ToolFormat) -> ToolUse | None:
    """What `request` allows, or None where no call may be made.

    Raises:
        InvalidRequest: a tool is no function, or `tool_choice` names none of them.
    """
    choice = request.tool_choice
    if not request.tools:
        if choice not in (None, "none", "auto"):
            raise InvalidRequest("tool_choice needs tools.", param="tool_choice")
        return None
    tools = tuple(_tool(tool) for tool in request.tools)
    match choice:
        case "none":
            return None
        case None | "auto":
            return ToolUse(form, tools, False, request.parallel_tool_calls)
        case "required":
            return ToolUse(form, tools, True, request.parallel_tool_calls)
        case {"type": "function", "function": {"name": str(name)}}:
            named = tuple(tool for tool in tools if tool.name == name)
            if not named:
                raise InvalidRequest(f"tool_choice names {name!r}, which is not among the tools.", param="tool_choice")
            return ToolUse(form, named, True, False)
        case _:
            raise InvalidRequest("tool_choice is none, auto, required or a function.", param="tool_choice")


def _tool(tool: Mapping[str, Any]) -> Tool:
    function = tool.get("function")
    if tool.get("type") != "function" or not isinstance(function, Mapping) or not function.get("name"):
        raise InvalidRequest("Only tools of type function, with a name, are supported.", param="tools")
    parameters = function.get("parameters") or {"type": "object", "properties": {}, "additionalProperties": False}
    if not isinstance(parameters, Mapping):
        raise InvalidRequest("A function's parameters are a JSON schema.", param="tools")
    return Tool(str(function["name"]), dict(parameters))


def with_tools_told(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages for a template that knows no tools: told to the model in words, in the Hermes format."""
    told = [dict(message) for message in messages]
    if not tools:
        return told
    listing = "\n".join(json.dumps(dict(tool), ensure_ascii=False) for tool in tools)
    words = (
        "You may call functions. They are:\n<tools>\n" + listing + "\n</tools>\n"
        "For each call write a JSON object with the function's name and arguments between tool_call tags:\n"
        '<tool_call>\n{"name": "function name", "arguments": {}}\n</tool_call>'
    )
    if told and told[0].get("role") in ("system", "developer"):
        told[0] = {**told[0], "content": f"{told[0].get('content') or ''}\n\n{words}".strip()}
    else:
        told.insert(0, {"role": "system", "content": words})
    return told


def in_words(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message with its calls, or its result, as text of the Hermes format."""
    calls = message.get("tool_calls")
    if message.get("role") == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message.get('content') or ''}\n</tool_response>"}
    if not calls:
        return dict(message)
    written = [
        "<tool_call>\n"
        + json.dumps({name: call["function"][name] for name in ("name", "arguments")}, ensure_ascii=False)
        + "\n</tool_call>"
        for call in calls
    ]
    return {"role": "assistant", "content": "\n".join([message.get("content") or "", *written]).strip()}
