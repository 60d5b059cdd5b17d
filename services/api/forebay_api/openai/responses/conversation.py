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

    @property
    def id(self) -> str | None:
        """The id of the item or of the response."""
        return self.response if self.item is None else self.item["id"]


class ConversationRecord(Message):
    """A conversation. `removed` holds the ids of deleted items that belong to responses.

    `created_at`: seconds since the epoch.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    id: str
    created_at: float
    metadata: dict[str, str] = Field(default_factory=dict)
    entries: tuple[Entry, ...] = ()
    removed: tuple[str, ...] = ()

    def changed(
        self, more: Sequence[Entry], metadata: dict[str, str] | None, without: str | None
    ) -> "ConversationRecord":
        """The same with more entries, other metadata, or without the item or the response `without`."""
        entries = tuple(entry for entry in self.entries if without is None or entry.id != without)
        of_response = without is not None and len(entries) == len(self.entries)
        return self.model_copy(
            update={
                "entries": (*entries, *more),
                "metadata": self.metadata if metadata is None else metadata,
                "removed": (*self.removed, without) if of_response else self.removed,
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
