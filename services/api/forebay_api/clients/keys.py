"""Who asks: `Authorization: Bearer`, one of the keys of API_KEYS and of the file API_KEYS_FILE."""

import asyncio
import hashlib
import logging
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pydantic import SecretStr
from starlette.requests import Request

from forebay_contracts import keys
from forebay_contracts.settings import ApiSettings
from forebay_contracts.wire.errors import ConfigurationError, InvalidApiKey

REREAD_S = 2.0
"""How often the keys file is looked at. Read, not watched: a mounted Secret is swapped by a link above it."""

_SECRET: Final = secrets.token_bytes(32)

SHORT_KEY = 16
"""Shorter keys of API_KEYS can be guessed, and are warned of."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Client:
    """Whose key a request carries; `name` None: the api is open to all.

    An operator sees and calls off everybody's requests, others their own. `max_requests` None: no bound.
    """

    name: str | None = None
    operator: bool = False
    max_requests: int | None = None

    def may_see(self, key: str | None) -> bool:
        """Whether a request that came with the key of this name is any of its business."""
        return self.operator or key == self.name


ANYBODY: Final = Client(operator=True)


class ApiKeys:
    """Who may come in; with no keys configured, everybody."""

    def __init__(self, settings: ApiSettings) -> None:
        self._file = settings.api_keys_file
        self._max_requests = settings.key_max_requests
        self._plain = _plain(settings.api_keys, self._max_requests)
        self._text: str | None = None
        self._clients: dict[bytes, Client] = self._plain
        self._by_name: dict[str, Client] = {}
        self._follower: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Read the keys file, and from then on whenever it has changed.

        Raises:
            ConfigurationError: it cannot be read, or cannot be meant.
        """
        self._use({})
        if self._file is not None:
            self._reread(self._file)
            self._follower = asyncio.create_task(self._follow(self._file))

    async def stop(self) -> None:
        """Look at the file no more."""
        if self._follower is not None:
            self._follower.cancel()

    def check(self, request: Request) -> Client:
        """Whose request it is. Raises InvalidApiKey unless it carries one of the keys."""
        if not self._clients:
            return ANYBODY
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not given:
            raise InvalidApiKey("You didn't provide an API key: send it as `Authorization: Bearer YOUR_KEY`.")
        # The bytes as they came: header values are decoded so.
        found = self._clients.get(_place(hashlib.sha256(given.strip().encode("latin-1")).digest()))
        if found is None:
            raise InvalidApiKey("Incorrect API key provided.")
        return found

    def of(self, name: str) -> Client | None:
        """The client of this name, as the file has it now."""
        return self._by_name.get(name)

    async def _follow(self, file: Path) -> None:
        complaint = ""
        while True:
            await asyncio.sleep(REREAD_S)
            try:
                self._reread(file)
                complaint = ""
            except ConfigurationError as exc:
                # Half written, or a slip: whoever could come in still can, until it is put right.
                if (said := str(exc)) != complaint:
                    log.error("[RequestQueue] %s; the keys of before stay", said)
                    complaint = said

    def _reread(self, file: Path) -> None:
        try:
            with file.open("rb") as opened:
                data = opened.read(keys.MAX_FILE_BYTES + 1)
            text = data.decode()
        except (OSError, UnicodeDecodeError) as exc:
            reason = exc.strerror if isinstance(exc, OSError) else "it is not UTF-8"
            raise ConfigurationError(f"API_KEYS_FILE={file} cannot be read: {reason}") from None
        if text == self._text:
            return
        if len(data) > keys.MAX_FILE_BYTES:
            raise ConfigurationError(f"API_KEYS_FILE={file} is larger than {keys.MAX_FILE_BYTES} bytes")
        try:
            entries = keys.parse(text)
            self._use(entries)
        except ConfigurationError as exc:
            raise ConfigurationError(f"API_KEYS_FILE={file}: {exc}") from None
        if self._text is not None:
            log.info("[RequestQueue] the keys file has changed: %d names", len(entries))
        self._text = text

    def _use(self, entries: dict[str, keys.KeyEntry]) -> None:
        clients = dict(self._plain)
        plain_names = {client.name for client in self._plain.values()}
        for name, entry in entries.items():
            if name in plain_names:
                raise ConfigurationError(f"[{name}] is what a key of API_KEYS is called: give it another name")
            client = Client(name, entry.operator, entry.max_requests or self._max_requests)
            clients |= {_place(bytes.fromhex(digest)): client for digest in entry.sha256}
        self._clients = clients
        self._by_name = {client.name: client for client in clients.values() if client.name is not None}


def _place(digest: bytes) -> bytes:
    """Where in the table the client of a key's hash stands.

    This process alone can tell where that is, so that the time a search takes says nothing of the keys that are good.
    That is a comparison in constant time with all of them at once.
    """
    return hashlib.blake2b(digest, key=_SECRET, digest_size=32).digest()


def _plain(given: Iterable[SecretStr], max_requests: int | None) -> dict[bytes, Client]:
    """The keys of API_KEYS, of which all are trusted alike: they are nameless, so they are numbered."""
    found = {}
    for number, secret in enumerate(dict.fromkeys(key.get_secret_value() for key in given), start=1):
        if len(secret) < SHORT_KEY:
            log.warning("[RequestQueue] key-%d of API_KEYS has fewer than %d characters", number, SHORT_KEY)
        digest = hashlib.sha256(secret.encode()).digest()
        found[_place(digest)] = Client(f"key-{number}", operator=True, max_requests=max_requests)
    return found
