"""The base of all messages on the wire: frozen, versioned, JSON (readable with `nats sub`)."""

from typing import Final

from pydantic import BaseModel, ConfigDict

SCHEMA_VERSION: Final = 1


class Message(BaseModel):
    """A frozen message. Unknown fields are ignored, so that a newer peer may add some."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    def encode(self) -> bytes:
        """The message as JSON."""
        return self.model_dump_json(exclude_defaults=True).encode()
