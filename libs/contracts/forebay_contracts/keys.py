"""Clients' keys: how one is made, and the file that holds their hashes and limits.

    [alice]
    sha256 = "2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae"
    max_requests = 20
    weight = 3
    tokens_per_minute = 50_000
    tokens_per_day = 2_000_000

    [nightly]
    sha256 = "…"
    tiers = ["flex"]

    [dashboard]
    sha256 = ["…", "…"]     # two while a new key replaces the old one
    operator = true

A key is 256 random bits, which nobody can guess. So the file holds plain SHA-256. The slow salted hashes that passwords
need would cost each request more than all other work of the api.
"""

import hashlib
import json
import re
import secrets
import tomllib
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from forebay_contracts.wire.errors import ConfigurationError

MAX_KEYS: Final = 1000
"""A bound, since each name is a label of metrics and costs memory there."""

MAX_FILE_BYTES: Final = 1_000_000

PREFIX: Final = "fb-"
"""The start of every key, so that scanners find leaked ones."""

NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class KeyEntry(BaseModel):
    """One name of the file: the hashes of its keys, and what they may do.

    `max_requests` bounds its unfinished requests; without it, KEY_MAX_REQUESTS does. An `operator` sees and cancels the
    requests of all keys, others only their own. Keys that have requests in the waiting room share the tokens by their
    `weight`. `tiers` are the service tiers that it may use, first the one of requests that ask for none.
    `tokens_per_minute` and `tokens_per_day` bound its tokens in and out.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)

    sha256: Annotated[
        tuple[Digest, ...],
        BeforeValidator(lambda given: tuple(given) if isinstance(given, list | tuple) else (given,)),
        Field(min_length=1, max_length=10),
    ]
    max_requests: int | None = Field(None, ge=1)
    operator: bool = False
    weight: float = Field(1.0, ge=0.000_001, le=1_000_000)
    tiers: Annotated[
        tuple[Literal["default", "flex"], ...],
        BeforeValidator(lambda given: tuple(given) if isinstance(given, list) else given),
        Field(min_length=1),
    ] = ("default", "flex")
    tokens_per_minute: int | None = Field(None, ge=1)
    tokens_per_day: int | None = Field(None, ge=1)


_entries: TypeAdapter[dict[str, KeyEntry]] = TypeAdapter(dict[str, KeyEntry])


def parse(text: str) -> dict[str, KeyEntry]:
    """The entries of a keys file by name.

    Raises:
        ConfigurationError: it names the place of the fault and quotes nothing, since that may be a key.
    """
    try:
        entries = _entries.validate_python(tomllib.loads(text))
    except ValidationError as exc:
        raise ConfigurationError("; ".join(_sentence(error) for error in exc.errors(include_input=False))) from None
    except (ValueError, RecursionError) as exc:  # TOMLDecodeError, and what the parser lets through
        raise ConfigurationError(f"not TOML: {exc}") from None
    if not entries:
        # Without any key the api is open to all. An empty file is a mistake and must not open it.
        raise ConfigurationError("it holds no key")
    if len(entries) > MAX_KEYS:
        raise ConfigurationError(f"it holds more than {MAX_KEYS} names")
    owners: dict[str, str] = {}
    for name, entry in entries.items():
        _check_name(name)
        for digest in entry.sha256:
            if owners.setdefault(digest, name) != name:
                raise ConfigurationError(f"[{owners[digest]}] and [{name}] have the same key")
    return entries


def make() -> str:
    """A new key."""
    return PREFIX + secrets.token_urlsafe(32)


def digest(key: bytes) -> str:
    """The hash of a key as the file holds it."""
    return hashlib.sha256(key).hexdigest()


def written(name: str, key: str, **fields: Any) -> str:
    """The entry of the file for a new key; `fields` are those of `KeyEntry`, and None leaves one out.

    Raises:
        ConfigurationError: `name` or a field is not allowed.
    """
    _check_name(name)
    given = {field: value for field, value in fields.items() if value is not None}
    try:
        entry = KeyEntry(sha256=(digest(key.encode()),), **given)
    except ValidationError as exc:
        raise ConfigurationError("; ".join(f"{one['loc'][0]}: {one['msg']}" for one in exc.errors())) from None
    # Numbers, strings, true, false and lists of them are written in TOML as in JSON.
    values = entry.model_dump(exclude_defaults=True) | {"sha256": entry.sha256[0]}
    lines = [f"{field} = {json.dumps(value)}" for field, value in values.items()]
    return "\n".join([f"[{name}]", *lines, ""])


def _check_name(name: str) -> None:
    if not NAME.fullmatch(name):
        raise ConfigurationError(f"[{name[:80]}] is no name: use a-z, 0-9, '_' and '-', at most 63 of them")


def _sentence(error: Any) -> str:
    name, *rest = (str(part) for part in error["loc"])
    where = f"[{name[:80]}]" + (f" {rest[0]}" if rest else "")
    return f"{where}: {'64 hexadecimal digits, in lower case' if 'pattern' in error['type'] else error['msg']}"
