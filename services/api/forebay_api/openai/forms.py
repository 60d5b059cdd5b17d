"""The form that an answer must have, in OpenAI's, vLLM's and llama.cpp's words."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import from_json

from forebay_api.openai.body import Bool, Many, Misfit, OpenModel, StrictModel

MAX_PATTERN = 64 * 1024
MAX_ALTERNATIVES = 1_000

Pattern = Annotated[str, Field(min_length=1, max_length=MAX_PATTERN)]
Alternatives = Annotated[Many[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=MAX_ALTERNATIVES)]
Schema = Annotated[dict[str, Any], BeforeValidator(lambda value: _parsed(value) if isinstance(value, str) else value)]
"""A JSON schema, or its text."""


class StructuredOutputs(StrictModel):
    """The form of the answer, in one of these ways. A grammar is llama.cpp's GBNF or llguidance's Lark."""

    json_: Schema | None = Field(None, alias="json")
    json_object: Bool | None = None
    regex: Pattern | None = None
    choice: Alternatives | None = None
    grammar: Pattern | None = None


def _parsed(text: str) -> Any:
    try:
        return from_json(text)
    except ValueError as exc:
        raise ValueError("a schema is a JSON object") from exc


class JsonSchema(OpenModel):
    """A named JSON schema that the answer must satisfy."""

    name: str
    description: str | None = None
    json_schema: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: Bool | None = None


class ResponseFormat(StrictModel):
    """What the answer must look like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="before")
    @classmethod
    def _object_of_a_schema(cls, value: Any) -> Any:
        """llama.cpp's way to name a schema."""
        if isinstance(value, dict) and value.get("type") == "json_object" and value.get("schema") is not None:
            schema = {"name": "answer", "schema": value["schema"]}
            return {"type": "json_schema", "json_schema": schema} | {
                name: member for name, member in value.items() if name not in ("type", "schema")
            }
        return value

    @model_validator(mode="after")
    def _has_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise Misfit("json_schema", "json_schema is needed with type json_schema, and only there")
        return self


FORMS = frozenset(
    {
        "response_format",
        "structured_outputs",
        "guided_json",
        "guided_regex",
        "guided_choice",
        "guided_grammar",
        "grammar",
    }
)
"""The parameters that say what form the answer must have."""


def form_of(given: Mapping[str, Any]) -> dict[str, Any] | None:
    """The form that the parameters in `given`, by their names, ask for, as it goes into the queue; None for any text.

    Raises:
        Misfit: they ask for two.
    """
    said = {name: value for name, value in given.items() if not isinstance(value, ResponseFormat | StructuredOutputs)}
    if (outputs := given.get("structured_outputs")) is not None:
        said |= {f"structured_outputs.{name}": value for name, value in outputs.model_dump(by_alias=True).items()}
    forms = {name: _form(name, value) for name, value in said.items() if value not in (None, False)}
    wanted = given.get("response_format")
    if wanted is not None and wanted.type != "text":
        forms["response_format"] = wanted.model_dump(mode="json", by_alias=True, exclude_none=True)
    if len(forms) > 1:
        first, second, *_ = forms
        raise Misfit(first, f"{first} and {second} exclude each other")
    return next(iter(forms.values()), None)


def _form(param: str, value: Any) -> dict[str, Any]:
    """The form that `param` asks for, written as a `response_format`."""
    match param.removeprefix("guided_").removeprefix("structured_outputs."):
        case "json":
            return {"type": "json_schema", "json_schema": {"name": "answer", "schema": value}, "param": param}
        case "json_object":
            return {"type": "json_object", "param": param}
        case kind:
            return {"type": kind, kind: value, "param": param}
