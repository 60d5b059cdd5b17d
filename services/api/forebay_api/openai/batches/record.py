"""What is kept of a batch: values of the KV bucket `inference-batches`, and the object that a client gets.

What a batch has answered stands in its two files, and is written there before it is counted here.
"""

import uuid
from typing import Any, Final, Literal

from pydantic import Field

from forebay_contracts.nats import clock
from forebay_contracts.wire.message import SCHEMA_VERSION, Message

PREFIX: Final = "batch_"
"""What the id of a batch begins with."""

KIND: Final = "batch"
"""The kind of these records (`forebay_api/in_flight/records.py`)."""

Status = Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]

FINAL: Final = ("completed", "failed", "expired", "cancelled")
"""The statuses after which nothing changes."""


class BatchError(Message):
    """Why a batch failed. `line` counts from 1."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


class BatchUsage(Message):
    """Tokens of all completed lines."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0


class BatchRecord(Message):
    """One batch. `run`: the name of the run that owns it. `times`: by status, when it began.

    Times: seconds since the epoch. `kept_s`: seconds for which its files are kept. `window`: most requests of it that
    are queued or run at once.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    id: str
    key: str | None = None
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: float
    expires_at: float
    kept_s: float
    window: int
    status: Status = "validating"
    times: dict[str, float] = Field(default_factory=dict)
    metadata: dict[str, str] | None = None
    model: str | None = None
    total: int = 0
    completed: int = 0
    failed: int = 0
    usage: BatchUsage = Field(default_factory=BatchUsage)
    errors: tuple[BatchError, ...] = ()
    output_file_id: str | None = None
    error_file_id: str | None = None
    run: str | None = None

    @property
    def waits(self) -> bool:
        """Whether no api has run it yet."""
        return self.status == "validating" and self.run is None

    def to(self, status: Status, **changes: Any) -> "BatchRecord":
        """The same with another status, that begins now."""
        times = self.times | {status: clock.now()}
        return self.model_copy(update={"status": status, "times": times, **changes})

    def named(self, what: str) -> uuid.UUID:
        """An id of something of the batch, the same whoever makes it."""
        return uuid.uuid5(uuid.UUID(self.id.removeprefix(PREFIX)), what)

    def object(self) -> dict[str, Any]:
        """OpenAI's batch object."""
        used = self.usage
        found: dict[str, Any] = {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "model": self.model,
            "errors": None,
            "input_file_id": self.input_file_id,
            "completion_window": self.completion_window,
            "status": self.status,
            "output_file_id": self.output_file_id,
            "error_file_id": self.error_file_id,
            "created_at": int(self.created_at),
            "expires_at": int(self.expires_at),
            "request_counts": {"total": self.total, "completed": self.completed, "failed": self.failed},
            "usage": {
                "input_tokens": used.prompt_tokens,
                "input_tokens_details": {"cached_tokens": used.cached_tokens},
                "output_tokens": used.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": used.reasoning_tokens},
                "total_tokens": used.prompt_tokens + used.completion_tokens,
            },
            "metadata": self.metadata,
        }
        if self.errors:
            found["errors"] = {"object": "list", "data": [error.model_dump() for error in self.errors]}
        for status in ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled"):
            at = self.times.get(status)
            found[f"{status}_at"] = None if at is None else int(at)
        return found
