"""The heartbeats of workers and apis, and what workers say of idle slots."""

from enum import StrEnum
from typing import Any, Literal

from pydantic import Field, field_validator

from forebay_contracts.wire.message import SCHEMA_VERSION, Message
from forebay_contracts.wire.request import GENERATION, CompletionType


class WorkerStatus(StrEnum):
    """What a worker is doing."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"


class ServiceInfo(Message):
    """A service's heartbeat. Times: seconds since the epoch.

    `model` is whose consumer it has made. `limits` are those of the shared limits that its environment sets, by the
    names of their settings; None: it is older and does not say.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    id: str
    version: str
    started_at: float
    heartbeat_at: float
    model: str | None = None
    limits: dict[str, float] | None = None

    def encode(self) -> bytes:
        """The heartbeat as JSON, every field written out."""
        return self.model_dump_json().encode()


class ApiInfo(ServiceInfo):
    """The heartbeat in the KV bucket `inference-apis`, its key the api instance's id.

    `unfinished` counts what each client's key, by name, has admitted and unfinished there.
    """

    unfinished: dict[str, int] = Field(default_factory=dict)


class WorkerInfo(ServiceInfo):
    """The heartbeat in the KV bucket `inference-workers`, its key the worker id."""

    model: str
    aliases: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    status: WorkerStatus
    progress: str | None = None
    slots: int
    busy: int = 0
    context_length: int | None = None
    quantization: str | None = None
    device: str | None = None
    engine: str
    completion_types: tuple[CompletionType, ...] = GENERATION

    @field_validator("completion_types", mode="before")
    @classmethod
    def _those_known_here(cls, value: Any) -> Any:
        """Without the types that only newer services know."""
        known = set(CompletionType)
        return [one for one in value if one in known] if isinstance(value, list) else value


class Used(Message):
    """What a deferred attempt at the request of a `key` has used: tokens of the prompt, if it was the first attempt,
    and of the answer."""

    schema_version: Literal[1] = SCHEMA_VERSION
    request_id: str
    key: str | None = None
    tokens: int = 0
