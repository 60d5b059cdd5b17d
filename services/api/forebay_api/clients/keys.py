"""Who asks: `Authorization: Bearer` or `x-api-key`, one of the keys of API_KEYS and of the file API_KEYS_FILE."""

import hashlib
import logging
import secrets
from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Final

from pydantic import SecretStr
from starlette.requests import Request

from forebay_api.clients.cross_site import CrossSite
from forebay_api.clients.followed_file import followed
from forebay_contracts import keys
from forebay_contracts.settings import ApiSettings
from forebay_contracts.wire.errors import ConfigurationError, InvalidApiKey, TierNotAllowed
from forebay_contracts.wire.request import Tier

_SECRET: Final = secrets.token_bytes(32)

SHORT_KEY = 16
"""Shorter keys of API_KEYS can be guessed, and cause a warning."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Client:
    """The owner of a key; `name` None: the api is open to all.

    An operator sees and cancels everybody's requests, others their own. `max_requests` None: no bound. `weight` and
    `tiers`: see `KeyEntry`.
    """

    name: str | None = None
    operator: bool = False
    max_requests: int | None = None
    weight: float = 1.0
    tiers: tuple[str, ...] = (Tier.DEFAULT, Tier.FLEX)
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None

    @property
    def limited(self) -> bool:
        """Whether the client has limits of its own."""
        return (self.max_requests or self.tokens_per_minute or self.tokens_per_day) is not None

    def may_see(self, key: str | None) -> bool:
        """Whether the client may see requests of the key of this name."""
        return self.operator or key == self.name

    def tier(self, asked: str | None) -> Tier:
        """The tier of a request that asks for the service tier `asked`. Raises TierNotAllowed."""
        if asked in (None, "auto"):
            return Tier(self.tiers[0])
        tier = Tier.FLEX if asked == Tier.FLEX else Tier.DEFAULT
        if tier not in self.tiers:
            raise TierNotAllowed(
                f"Your key `{self.name}` may not use the service tier `{asked}`.", param="service_tier"
            )
        return tier


ANYBODY: Final = Client(operator=True)


class ApiKeys:
    """Who may use the api; without any keys, everybody but the pages of other sites."""

    def __init__(self, settings: ApiSettings) -> None:
        self._file = settings.api_keys_file
        self._max_requests = settings.key_max_requests
        self._plain = _plain(settings.api_keys, self._max_requests)
        self._cross_site = CrossSite(settings)
        self._use({})

    def followed(self) -> AbstractAsyncContextManager[None]:
        """Read the keys file, and follow its changes. Raises ConfigurationError if it is unreadable or not valid."""
        return followed("API_KEYS_FILE", self._file, "keys", self._take)

    def check(self, request: Request) -> Client:
        """The client of a request.

        Raises:
            InvalidApiKey: it does not carry one of the keys.
            UnknownHost, ForeignPage, NotJson: there are no keys, and the page of another site may have sent it.
        """
        if not self._clients:
            self._cross_site.check(request.scope)
            return ANYBODY
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not given:
            given = request.headers.get("x-api-key", "")
        if not given:
            raise InvalidApiKey(
                "You didn't provide an API key: send it as `Authorization: Bearer YOUR_KEY`, or as `x-api-key`."
            )
        # Starlette decodes header values as latin-1: this gives the bytes as they came.
        found = self._clients.get(_place(hashlib.sha256(given.strip().encode("latin-1")).digest()))
        if found is None:
            raise InvalidApiKey("Incorrect API key provided.")
        return found

    def of(self, name: str) -> Client | None:
        """The client of this name, as the file has it now."""
        return self._by_name.get(name)

    def weight(self, name: str | None) -> float:
        """The weight of a key, 1 if it is not known any more."""
        client = self._by_name.get(name or "")
        return 1.0 if client is None else client.weight

    def with_token_limits(self) -> list[Client]:
        """The clients whose tokens are limited."""
        return [client for client in self._by_name.values() if client.tokens_per_minute or client.tokens_per_day]

    def _take(self, text: str) -> int:
        entries = keys.parse(text)
        self._use(entries)
        return len(entries)

    def _use(self, entries: dict[str, keys.KeyEntry]) -> None:
        clients = dict(self._plain)
        plain_names = {client.name for client in self._plain.values()}
        for name, entry in entries.items():
            if name in plain_names:
                raise ConfigurationError(f"[{name}] is what a key of API_KEYS is called: give it another name")
            client = Client(
                name,
                entry.operator,
                entry.max_requests or self._max_requests,
                entry.weight,
                entry.tiers,
                entry.tokens_per_minute,
                entry.tokens_per_day,
            )
            clients |= {_place(bytes.fromhex(digest)): client for digest in entry.sha256}
        self._clients = clients
        self._by_name = {client.name: client for client in clients.values() if client.name is not None}


def _place(digest: bytes) -> bytes:
    """The place of a key's hash in the table of clients.

    It depends on a secret of this process. So the time of a search tells nothing about valid keys, as if the key were
    compared with each of them in constant time.
    """
    return hashlib.blake2b(digest, key=_SECRET, digest_size=32).digest()


def _plain(given: Iterable[SecretStr], max_requests: int | None) -> dict[bytes, Client]:
    """The clients of API_KEYS. The keys have no names, so they are numbered; all of them are operators'."""
    found = {}
    for number, secret in enumerate(dict.fromkeys(key.get_secret_value() for key in given), start=1):
        if len(secret) < SHORT_KEY:
            log.warning("[RequestQueue] key-%d of API_KEYS has fewer than %d characters", number, SHORT_KEY)
        digest = hashlib.sha256(secret.encode()).digest()
        found[_place(digest)] = Client(f"key-{number}", operator=True, max_requests=max_requests)
    return found
