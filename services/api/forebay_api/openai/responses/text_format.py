"""The parameters `text` and `reasoning`: what an answer looks like, and how much the model thinks before it."""

from typing import Annotated, Any, Literal

from pydantic import Field

from forebay_api.openai.body import Bool, LenientModel, StrictModel
from forebay_api.openai.responses.tools import Schema


class PlainText(StrictModel):
    """Any text."""

    type: Literal["text"]


class JsonObject(StrictModel):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchema(LenientModel):
    """A JSON object that satisfies a schema."""

    type: Literal["json_schema"]
    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_-]+$")]
    description: str | None = None
    json_schema: Schema = Field(alias="schema")
    strict: Bool | None = None


class TextConfig(StrictModel):
    """The form of the answer's text. `verbosity` has no effect."""

    format: Annotated[PlainText | JsonObject | JsonSchema, Field(discriminator="type")] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None

    def response_format(self) -> dict[str, Any] | None:
        """The form as a chat request has it."""
        wanted = self.format
        if isinstance(wanted, JsonSchema):
            return {
                "type": "json_schema",
                "json_schema": wanted.model_dump(by_alias=True, exclude_none=True, exclude={"type"}),
            }
        return {"type": "json_object"} if isinstance(wanted, JsonObject) else None

    def shown(self) -> dict[str, Any]:
        """The form as the response shows it."""
        wanted = self.format or PlainText(type="text")
        form = wanted.model_dump(by_alias=True)
        if isinstance(wanted, JsonSchema):
            form["strict"] = bool(wanted.strict)
        return {"format": form, "verbosity": self.verbosity or "medium"}


class Reasoning(StrictModel):
    """How much the model thinks. A summary is never made: the response holds what the model thought itself."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None
    context: Literal["auto", "current_turn", "all_turns"] | None = None
    mode: str | None = None

    def template_arguments(self) -> dict[str, Any]:
        """The variables for chat templates."""
        return {} if self.effort is None else {"reasoning_effort": self.effort}
