"""The messages of a conversation, and the blocks that they hold.

Source: https://docs.anthropic.com/en/api/messages.
"""

from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic_core import to_json

from forebay_api.openai.body import Many, OpenModel

BLOCKS_JOINED_BY = "\n"
"""What stands between two text blocks of one message."""


class TextBlock(OpenModel):
    """Text."""

    type: Literal["text"]
    text: str


class PlainText(OpenModel):
    """The text of a document."""

    type: Literal["text"]
    data: str


class DocumentBlock(OpenModel):
    """A document; only plain text is understood."""

    type: Literal["document"]
    source: PlainText
    title: str | None = None

    @property
    def text(self) -> str:
        """Its title and its text."""
        return f"{self.title}\n{self.source.data}" if self.title else self.source.data


class ThinkingBlock(OpenModel):
    """What the model thought in an earlier answer."""

    type: Literal["thinking"]
    thinking: str


class RedactedThinkingBlock(OpenModel):
    """What another service's model thought, encrypted. The model here cannot read it."""

    type: Literal["redacted_thinking"]


class ToolUseBlock(OpenModel):
    """A call that an earlier answer made."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]

    def call(self) -> dict[str, Any]:
        """The call in OpenAI's form."""
        arguments = to_json(self.input, inf_nan_mode="null").decode()  # with integers of any size
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": arguments}}


ResultBlock = Annotated[TextBlock | DocumentBlock, Field(discriminator="type")]


class ToolResultBlock(OpenModel):
    """What a call gave."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | Many[ResultBlock] = ""


UserBlock = Annotated[TextBlock | DocumentBlock | ToolResultBlock, Field(discriminator="type")]
AssistantBlock = Annotated[
    TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock, Field(discriminator="type")
]


class SystemMessage(OpenModel):
    """Instructions in the middle of a conversation."""

    role: Literal["system"]
    content: str | Many[TextBlock]

    def plain(self) -> Iterator[dict[str, Any]]:
        """The message in OpenAI's form."""
        yield {"role": "system", "content": text_of(self.content)}


class UserMessage(OpenModel):
    """What the user says, and what calls gave."""

    role: Literal["user"]
    content: str | Many[UserBlock]

    def plain(self) -> Iterator[dict[str, Any]]:
        """The messages in OpenAI's form: one for each result, and one for the text."""
        blocks = () if isinstance(self.content, str) else self.content
        results = [block for block in blocks if isinstance(block, ToolResultBlock)]
        for result in results:
            yield {"role": "tool", "tool_call_id": result.tool_use_id, "content": text_of(result.content)}
        if isinstance(self.content, str) or len(results) < len(blocks) or not blocks:
            yield {"role": "user", "content": text_of(self.content)}


class AssistantMessage(OpenModel):
    """An earlier answer; as the last message, the beginning of this one."""

    role: Literal["assistant"]
    content: str | Many[AssistantBlock]

    @property
    def calls(self) -> list[dict[str, Any]]:
        """Its calls in OpenAI's form."""
        return [block.call() for block in self.content if isinstance(block, ToolUseBlock)]

    def plain(self) -> Iterator[dict[str, Any]]:
        """The message in OpenAI's form."""
        message: dict[str, Any] = {"role": "assistant", "content": text_of(self.content)}
        blocks = () if isinstance(self.content, str) else self.content
        if calls := self.calls:
            message["tool_calls"] = calls
        if thought := "".join(block.thinking for block in blocks if isinstance(block, ThinkingBlock)):
            message["reasoning_content"] = thought
        yield message


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


def text_of(content: str | Iterable[OpenModel]) -> str:
    """The text of a message: its text blocks, and no others."""
    if isinstance(content, str):
        return content
    return BLOCKS_JOINED_BY.join(block.text for block in content if isinstance(block, TextBlock | DocumentBlock))
