"""The items of a response's input, and the form in which they are stored and listed.

Source: https://platform.openai.com/docs/api-reference/responses/create, `input`.
"""

from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from forebay_api.openai.body import LenientModel, Many, Misfit
from forebay_api.openai.responses.compaction import opened

_TEXT_PARTS = ("input_text", "output_text", "text", "refusal")

Id = Annotated[str, Field(min_length=1, max_length=256)]
Status = Literal["in_progress", "completed", "incomplete"]


class Part(LenientModel):
    """A part of a message's content; only text is understood."""

    type: str
    text: str | None = None
    refusal: str | None = None

    @field_validator("type")
    @classmethod
    def _is_text(cls, value: str) -> str:
        if value not in _TEXT_PARTS:
            raise ValueError(f"parts of type {value[:64]!r} are not served here, only text")
        return value

    @model_validator(mode="after")
    def _has_text(self) -> Self:
        member = "refusal" if self.type == "refusal" else "text"
        if getattr(self, member) is None:
            raise Misfit(member, f"a part of type {self.type!r} needs {member}")
        return self

    def input(self) -> dict[str, Any]:
        """The part as one of an input."""
        return {"type": "input_text", "text": self.text if self.type != "refusal" else self.refusal}

    def output(self) -> dict[str, Any]:
        """The part as one of an answer."""
        if self.type == "refusal":
            return {"type": "refusal", "refusal": self.refusal}
        return {"type": "output_text", "text": self.text, "annotations": []}


Content = str | Many[Part]


class Item(LenientModel):
    """One item. `prefix` begins the id that it is given."""

    prefix: ClassVar[str]
    id: Id | None = None

    @abstractmethod
    def members(self) -> dict[str, Any]:
        """The item as it is stored, without its id."""


class MessageItem(Item):
    """A message of the conversation."""

    prefix = "msg"
    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    status: Status | None = None
    phase: Literal["commentary", "final_answer"] | None = None

    def members(self) -> dict[str, Any]:
        """The message, its content as parts."""
        content = (Part(type="text", text=self.content),) if isinstance(self.content, str) else self.content
        parts = [part.output() if self.role == "assistant" else part.input() for part in content]
        members = {"type": "message", "status": self.status or "completed", "role": self.role, "content": parts}
        return members | ({"phase": self.phase} if self.phase is not None else {})


class FunctionCallItem(Item):
    """A function that an earlier answer called, its arguments as JSON text."""

    prefix = "fc"
    type: Literal["function_call"]
    call_id: Id
    name: Id
    namespace: Id | None = None
    arguments: str
    status: Status | None = None

    def members(self) -> dict[str, Any]:
        """The call."""
        return self.model_dump(exclude={"id"}, exclude_none=True) | {"status": self.status or "completed"}


class CustomToolCallItem(Item):
    """A custom tool that an earlier answer called."""

    prefix = "ctc"
    type: Literal["custom_tool_call"]
    call_id: Id
    name: Id
    namespace: Id | None = None
    input: str
    status: Status | None = None

    def members(self) -> dict[str, Any]:
        """The call."""
        return self.model_dump(exclude={"id"}, exclude_none=True) | {"status": self.status or "completed"}


class CallOutputItem(Item):
    """What a call gave."""

    prefix = "out"
    type: Literal["function_call_output", "custom_tool_call_output"]
    call_id: Id
    output: Content
    status: Status | None = None

    def members(self) -> dict[str, Any]:
        """The output, its parts as those of an input."""
        output = self.output if isinstance(self.output, str) else [part.input() for part in self.output]
        status = self.status or "completed"
        return {"type": self.type, "call_id": self.call_id, "output": output, "status": status}


class ReasoningPart(LenientModel):
    """A part of what a model thought, or of its summary."""

    type: Literal["reasoning_text", "summary_text", "text"]
    text: str


class ReasoningItem(Item):
    """What the model thought in an earlier answer. `encrypted_content` of another service cannot be read."""

    prefix = "rs"
    type: Literal["reasoning"]
    summary: Many[ReasoningPart] = ()
    content: Many[ReasoningPart] | None = None

    def members(self) -> dict[str, Any]:
        """The reasoning, with its summary."""
        return {
            "type": "reasoning",
            "summary": [{"type": "summary_text", "text": part.text} for part in self.summary],
            "content": [{"type": "reasoning_text", "text": part.text} for part in self.content or ()],
        }


class CompactionItem(Item):
    """The summary that a compaction made of what was said before."""

    prefix = "cmp"
    type: Literal["compaction"]
    encrypted_content: str

    @field_validator("encrypted_content")
    @classmethod
    def _is_ours(cls, value: str) -> str:
        try:
            opened(value)
        except ValueError:
            raise ValueError("no compaction of this service made it") from None
        return value

    def members(self) -> dict[str, Any]:
        """The summary."""
        return {"type": self.type, "encrypted_content": self.encrypted_content}


class ItemReference(LenientModel):
    """An item of an earlier response, by its id."""

    type: Literal["item_reference"] | None = None
    id: Id


class OtherItem(LenientModel):
    """An item that is not served."""

    type: str

    @field_validator("type")
    @classmethod
    def _refused(cls, value: str) -> str:
        raise ValueError(f"items of type {value[:64]!r} are not served here")


def _kind(value: Any) -> str:
    """The tag of an item. It is no member's name, since errors name both."""
    kind = value.get("type") if isinstance(value, dict) else "message"
    match kind:
        case None:
            return "reference item" if "id" in value and "role" not in value else "message item"
        case "message" | "function_call" | "custom_tool_call" | "reasoning" | "compaction":
            return f"{kind} item"
        case "function_call_output" | "custom_tool_call_output":
            return "output item"
        case "item_reference":
            return "reference item"
    return "other item"


InputItem = Annotated[
    Annotated[MessageItem, Tag("message item")]
    | Annotated[FunctionCallItem, Tag("function_call item")]
    | Annotated[CustomToolCallItem, Tag("custom_tool_call item")]
    | Annotated[CallOutputItem, Tag("output item")]
    | Annotated[ReasoningItem, Tag("reasoning item")]
    | Annotated[CompactionItem, Tag("compaction item")]
    | Annotated[ItemReference, Tag("reference item")]
    | Annotated[OtherItem, Tag("other item")],
    Discriminator(_kind),
]
