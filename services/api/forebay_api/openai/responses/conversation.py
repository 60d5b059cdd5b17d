"""Conversations: what is stored of one, and its object.

Source: https://platform.openai.com/docs/api-reference/conversations.
"""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from forebay_contracts.wire.message import SCHEMA_VERSION, Message


class Entry(Message):
    """A part of a conversation: an item that was added, or a response with its input and its output."""

    item: dict[str, Any] | None = None
    response: str | None = None


class ConversationRecord(Message):
    """A conversation. `removed` holds the ids of items that were deleted. `created_at`: seconds since the epoch."""

    schema_version: Literal[1] = SCHEMA_VERSION
    id: str
    created_at: float
    metadata: dict[str, str] = Field(default_factory=dict)
    entries: tuple[Entry, ...] = ()
    removed: tuple[str, ...] = ()

    def changed(
        self, more: Sequence[Entry], metadata: dict[str, str] | None, without: str | None
    ) -> "ConversationRecord":
        """The same with more entries, other metadata, or without an item."""
        return self.model_copy(
            update={
                "entries": (*self.entries, *more),
                "metadata": self.metadata if metadata is None else metadata,
                "removed": self.removed if without is None else (*self.removed, without),
            }
        )

    def object(self) -> dict[str, Any]:
        """OpenAI's conversation object."""
        return {
            "id": self.id,
            "object": "conversation",
            "created_at": int(self.created_at),
            "metadata": self.metadata,
        }
