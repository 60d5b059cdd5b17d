"""The receivers of webhooks, from the operator's file WEBHOOKS_FILE. No client can name one.

    [orders]
    url = "https://orders.example.com/forebay"
    secret = "whsec_…"                                      # or two, while a new one replaces the old one
    key = "alice"                                           # whose events; without it, those of all keys
    events = ["response.completed", "response.failed"]      # without it, all

A secret is `whsec_` and the base64 of 24 to 64 random bytes, as Standard Webhooks says.
"""

import base64
import binascii
import hashlib
import hmac
import tomllib
from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Annotated, Any, Final
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, field_validator

from forebay_api.clients.followed_file import followed
from forebay_contracts.keys import NAME
from forebay_contracts.wire.errors import ConfigurationError
from forebay_contracts.wire.event import EVENT_TYPES, Event, EventType

MAX_ENDPOINTS: Final = 1000

PREFIX: Final = "whsec_"


def _listed(given: Any) -> Any:
    return tuple(given) if isinstance(given, list | tuple) else (given,)


class Endpoint(BaseModel):
    """One receiver."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)

    url: str
    secret: Annotated[tuple[str, ...], BeforeValidator(_listed), Field(min_length=1, max_length=5)]
    key: Annotated[str, Field(pattern=f"^{NAME.pattern}$")] | None = None
    events: Annotated[tuple[EventType, ...], BeforeValidator(_listed), Field(min_length=1)] = EVENT_TYPES

    @field_validator("url")
    @classmethod
    def _is_http(cls, value: str) -> str:
        import httpx  # here, since HTTP clients take 10 MB of memory

        try:
            parts = httpx.URL(value)
            host, _ = parts.host, urlsplit(value).port  # each finds other faults
        except (httpx.InvalidURL, ValueError):
            raise ValueError("it is no URL") from None
        if parts.scheme not in ("http", "https") or not host:
            raise ValueError("expected http:// or https:// and a host")
        return value

    @field_validator("secret")
    @classmethod
    def _are_secrets(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for secret in value:
            if not secret.startswith(PREFIX) or not 24 <= len(_raw(secret)) <= 64:
                raise ValueError("expected whsec_ and the base64 of 24 to 64 bytes")
        return value

    def wants(self, event: Event) -> bool:
        """Whether it is told of `event`."""
        return event.type in self.events and self.key in (None, event.key)

    def headers(self, event_id: str, at: int, body: bytes) -> dict[str, str]:
        """The headers of Standard Webhooks, with a signature by each secret. `at`: seconds since the epoch."""
        signed = b"%s.%d.%s" % (event_id.encode(), at, body)
        signatures = (hmac.digest(_raw(secret), signed, hashlib.sha256) for secret in self.secret)
        return {
            "webhook-id": event_id,
            "webhook-timestamp": str(at),
            "webhook-signature": " ".join(f"v1,{base64.b64encode(one).decode()}" for one in signatures),
            "content-type": "application/json",
            "user-agent": "Forebay",
        }


def _raw(secret: str) -> bytes:
    try:
        return base64.b64decode(secret.removeprefix(PREFIX), validate=True)
    except binascii.Error:
        return b""


_entries: TypeAdapter[dict[str, Endpoint]] = TypeAdapter(dict[str, Endpoint])


def parse(text: str) -> dict[str, Endpoint]:
    """The endpoints of a file by name. Raises ConfigurationError, which quotes nothing of the file but names."""
    try:
        entries = _entries.validate_python(tomllib.loads(text))
    except ValidationError as exc:
        raise ConfigurationError("; ".join(_sentence(error) for error in exc.errors(include_input=False))) from None
    except (ValueError, RecursionError) as exc:  # TOMLDecodeError, and what the parser lets through
        raise ConfigurationError(f"not TOML: {exc}") from None
    if len(entries) > MAX_ENDPOINTS:
        raise ConfigurationError(f"it holds more than {MAX_ENDPOINTS} names")
    for name in entries:
        if not NAME.fullmatch(name):
            raise ConfigurationError(f"[{name[:80]}] is no name: use a-z, 0-9, '_' and '-', at most 63 of them")
    return entries


def _sentence(error: Any) -> str:
    name, *rest = (str(part) for part in error["loc"])
    where = f"[{name[:80]}]" + (f" {rest[0]}" if rest else "")
    return f"{where}: {error['msg'].removeprefix('Value error, ')}"


class Endpoints:
    """The endpoints by name, as the file has them now; none without a file."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self.named: dict[str, Endpoint] = {}

    def followed(self) -> AbstractAsyncContextManager[None]:
        """Read the file, and follow its changes. Raises ConfigurationError if it is unreadable or not valid."""
        return followed("WEBHOOKS_FILE", self._file, "webhooks", self._take)

    def _take(self, text: str) -> int:
        self.named = parse(text)
        return len(self.named)

    def wanted(self, key: str | None, kind: str) -> bool:
        """Whether anybody is told of events of `kind` (`response`, `batch`) of the key of this name."""
        return any(
            endpoint.key in (None, key) and any(one.startswith(kind + ".") for one in endpoint.events)
            for endpoint in self.named.values()
        )

    def of(self, event: Event) -> Iterable[str]:
        """The names of those that are told of `event`."""
        return [name for name, endpoint in self.named.items() if endpoint.wants(event)]
