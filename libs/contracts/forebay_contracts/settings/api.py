"""The settings of the api."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import NoDecode

from forebay_contracts.settings.shared import Settings

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[a-z0-9.:\[\]_-]+")
_HOST_NAME = re.compile(r"\*|(\*\.)?[a-z0-9_-]+(\.[a-z0-9_-]+)*", re.I)


class ApiSettings(Settings):
    """The settings of the api."""

    api_host: str = Field("127.0.0.1", min_length=1, description="Address that the api listens on")
    api_port: int = Field(8091, ge=0, le=65_535, description="Port that the api listens on")
    api_processes: int = Field(1, ge=1, le=64, description="Number of api processes that share the port")
    no_worker_policy: Literal["wait", "refuse"] = Field(
        "wait", description="If the model of a request has no worker now: the request waits, or gets 503"
    )
    api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        (), description="Keys that clients may use, comma-separated; without keys and file, everybody may use the api"
    )
    api_keys_file: Path | None = Field(
        None, description="TOML file of further keys with names, hashes and limits; read again when it changes"
    )
    key_max_requests: int | None = Field(
        None,
        ge=1,
        le=10_000_000,
        description="Most unfinished requests of one key; empty: only MAX_QUEUE_SIZE limits them",
    )
    key_overflow: Literal["refuse", "defer"] = Field(
        "refuse", description="What a key has beyond KEY_MAX_REQUESTS gets 429, or waits in the waiting room"
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Origins whose pages may call the api from a browser (CORS), comma-separated; empty: none"
    )
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Names of this api (`Host`) besides localhost and its machine's, comma-separated, `*.example.com` "
        "for all below; checked as long as there are no keys",
    )
    max_request_bytes: int = Field(
        900_000,
        ge=1_024,
        le=60_000_000,
        description="Largest body of a request; the default limit of NATS for a message is 1 MB",
    )
    body_timeout: float = Field(
        60, ge=1, le=3600, description="Seconds that a client has to send a body, or the next megabyte of a file"
    )
    stream_keep_alive: float = Field(
        15, ge=0, le=3600, description="Seconds without an event after which a stream gets a sign of life; 0: never"
    )
    admission_patience: float = Field(
        10, ge=0, le=3600, description="Seconds that a new request waits for NATS before it gets 503"
    )
    shutdown_delay: float = Field(
        0, ge=0, le=600, description="Seconds after SIGTERM in which the api still serves but is not ready"
    )
    drain_timeout: float = Field(30, ge=0, le=3600, description="Seconds after SIGTERM for running requests to end")
    max_file_bytes: int = Field(
        200_000_000, ge=1_024, le=10_000_000_000, description="Largest file that may be uploaded; more gets 413"
    )
    batch_window: int = Field(
        100, ge=1, le=10_000, description="Most requests of one batch that are queued or run at once"
    )
    webhooks_file: Path | None = Field(
        None, description="TOML file of the receivers of webhooks (docs/webhooks.md); read again when it changes"
    )
    webhook_timeout: float = Field(
        10, ge=0.1, le=30, description="Seconds that the receiver of a webhook has to answer"
    )
    webhook_retry_max: float = Field(
        3600, ge=0.1, le=86_400, description="Longest pause, in seconds, between two tries at a webhook"
    )

    @field_validator("api_keys", "cors_origins", "allowed_hosts", mode="before")
    @classmethod
    def _split_list(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        parts = tuple(part.strip() for part in value.split(",") if part.strip())
        # Without keys the api is open to all, which must not come from a slip.
        if value and not parts:
            raise ValueError("this names nothing; leave it empty to have none")
        return parts

    @field_validator("cors_origins")
    @classmethod
    def _origins_are_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            if not _ORIGIN.fullmatch(origin):
                raise ValueError(f"an origin is like https://chat.example.com, without a path, not {origin!r}")
        return value

    @field_validator("allowed_hosts")
    @classmethod
    def _hosts_are_names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for host in value:
            if not _HOST_NAME.fullmatch(host):
                raise ValueError(f"a host is like forebay.example.com, without a scheme or a port, not {host!r}")
        return value
