"""The tools of a response: which are served, and how the model's calls lead back to them.

A model calls functions. So a custom tool becomes a function with one parameter, and a tool of a namespace a function
whose name begins with the namespace. Tools that only a hosted service runs are left out; `tools` of the response shows
which are served.
"""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Final, Literal, NamedTuple, Self

import orjson
from pydantic import AfterValidator, Discriminator, Field, Tag, field_validator, model_validator

from forebay_api.openai.body import Bool, LenientModel, Many, Misfit

CUSTOM_INPUT: Final = "input"
"""The one parameter of a custom tool."""

# By their first word: there are dated versions, such as `web_search_preview_2025_03_11`.
_HOSTED: Final = (
    "apply_patch",
    "code_interpreter",
    "computer",
    "file_search",
    "image_generation",
    "local_shell",
    "mcp",
    "programmatic_tool_calling",
    "shell",
    "tool_search",
    "web_search",
)

ToolName = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[a-zA-Z0-9_-]+$")]


def _writable(value: dict[str, Any]) -> dict[str, Any]:
    try:
        orjson.dumps(value)
    except TypeError as exc:
        raise ValueError("expected integers of at most 64 bits") from exc
    return value


Schema = Annotated[dict[str, Any], AfterValidator(_writable)]
"""A JSON schema that responses can show."""


class FunctionTool(LenientModel):
    """A function that the client runs; `parameters` is a JSON schema."""

    type: Literal["function"]
    name: ToolName
    description: str | None = None
    parameters: Schema | None = None
    strict: Bool | None = None


class InputFormat(LenientModel):
    """What a custom tool takes: any text, or a text that follows a grammar."""

    type: Literal["text", "grammar"]
    syntax: Literal["lark", "regex"] | None = None
    definition: str | None = None

    @model_validator(mode="after")
    def _has_definition(self) -> Self:
        for member in ("syntax", "definition"):
            if (self.type == "grammar") != (getattr(self, member) is not None):
                raise Misfit(member, f"{member} is needed with type grammar, and only there")
        return self


class CustomTool(LenientModel):
    """A tool that the client runs on a text."""

    type: Literal["custom"]
    name: ToolName
    description: str | None = None
    format: InputFormat | None = None


class HostedTool(LenientModel):
    """A tool that only a hosted service runs."""

    type: str

    @field_validator("type")
    @classmethod
    def _known(cls, value: str) -> str:
        if not value.startswith(_HOSTED):
            raise ValueError(f"{value[:64]!r} is no type of a tool")
        return value


def _plain_kind(value: Any) -> str:
    kind = value.get("type") if isinstance(value, Mapping) else None
    # A tag must be no member's name: errors name both.
    return f"{kind} tool" if kind in ("function", "custom") else "hosted tool"


def _kind(value: Any) -> str:
    return "namespace tool" if isinstance(value, Mapping) and value.get("type") == "namespace" else _plain_kind(value)


PlainTool = (
    Annotated[FunctionTool, Tag("function tool")]
    | Annotated[CustomTool, Tag("custom tool")]
    | Annotated[HostedTool, Tag("hosted tool")]
)


class NamespaceTool(LenientModel):
    """Tools whose names belong together."""

    type: Literal["namespace"]
    name: ToolName
    description: str | None = None
    tools: Many[Annotated[PlainTool, Discriminator(_plain_kind)]] = ()


Tool = Annotated[PlainTool | Annotated[NamespaceTool, Tag("namespace tool")], Discriminator(_kind)]


class NamedChoice(LenientModel):
    """The one tool that must be called."""

    type: Literal["function", "custom"]
    name: ToolName
    namespace: ToolName | None = None


class AllowedTool(LenientModel):
    """One of the tools that may be called."""

    type: str
    name: ToolName | None = None
    namespace: ToolName | None = None


class AllowedTools(LenientModel):
    """The tools that may be called, of all that are offered."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[Many[AllowedTool], Field(min_length=1)]


class HostedChoice(HostedTool):
    """A hosted tool that must be called: refused."""

    @field_validator("type")
    @classmethod
    def _refused(cls, value: str) -> str:
        raise ValueError(f"a tool of type {value[:64]!r} is not served here")


def _choice_kind(value: Any) -> str:
    match value:
        case str():
            return "mode of choice"
        case {"type": "function" | "custom"}:
            return "named choice"
        case {"type": "allowed_tools"}:
            return "allowed choice"
    return "hosted choice"


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("mode of choice")]
    | Annotated[NamedChoice, Tag("named choice")]
    | Annotated[AllowedTools, Tag("allowed choice")]
    | Annotated[HostedChoice, Tag("hosted choice")],
    Discriminator(_choice_kind),
]


class Served(NamedTuple):
    """A tool that the model may call, as the response shows it, and its namespace."""

    tool: Mapping[str, Any]
    namespace: str | None

    @property
    def custom(self) -> bool:
        """Whether it takes a text."""
        return bool(self.tool["type"] == "custom")


def function_name(name: str, namespace: str | None) -> str:
    """The name under which the model knows a tool."""
    return name if namespace is None else f"{namespace}__{name}"


def shown(tools: Iterable[Any]) -> list[dict[str, Any]]:
    """The served ones of a body's tools, as the response shows them."""
    objects = []
    for tool in tools:
        if isinstance(tool, NamespaceTool):
            if inner := shown(tool.tools):
                about = {"type": tool.type, "name": tool.name, "description": tool.description or ""}
                objects.append({**about, "tools": inner})
        elif isinstance(tool, FunctionTool):
            objects.append(tool.model_dump())
        elif isinstance(tool, CustomTool):
            objects.append(tool.model_dump(exclude_none=True))
    return objects


def by_function_name(tools: Iterable[Mapping[str, Any]]) -> dict[str, Served]:
    """The tools that `shown` gives, by the names under which the model knows them. Of one name the first is served."""
    found: dict[str, Served] = {}
    for tool in tools:
        namespace = tool["name"] if tool["type"] == "namespace" else None
        for one in tool["tools"] if namespace is not None else (tool,):
            found.setdefault(function_name(one["name"], namespace), Served(one, namespace))
    return found


def as_function(name: str, served: Served) -> dict[str, Any]:
    """The tool as a chat request has it."""
    tool = served.tool
    function: dict[str, Any] = {"name": name}
    if served.custom:
        text = {"type": "string", "description": "The whole input, as plain text."}
        function["description"] = _with_grammar(tool)
        function["parameters"] = {
            "type": "object",
            "properties": {CUSTOM_INPUT: text},
            "required": [CUSTOM_INPUT],
            "additionalProperties": False,
        }
    else:
        function |= {key: tool[key] for key in ("description", "parameters", "strict") if tool[key] is not None}
    return {"type": "function", "function": function}


def _with_grammar(tool: Mapping[str, Any]) -> str:
    told: str = tool.get("description", "")
    form = tool.get("format", {})
    if "definition" in form:
        syntax = "regular expression" if form.get("syntax") == "regex" else "Lark grammar"
        told = f"{told}\n\nThe input must match this {syntax}:\n{form['definition']}".strip()
    return told
