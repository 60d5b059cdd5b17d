"""The connection to NATS. It reconnects for ever and never buffers what it cannot send."""

import asyncio
import contextlib
import logging
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Literal

import nats.aio.client
import nkeys
from nats.aio.client import Client
from nats.errors import AuthorizationError
from nats.errors import Error as NatsError
from nats.js import JetStreamContext

from forebay_contracts.nats.request_reply import Requests
from forebay_contracts.settings import Settings
from forebay_contracts.wire.errors import ConfigurationError, QueueUnavailable

DEFAULT_NATS_URL = "nats://127.0.0.1:4222"
CONNECT_TIMEOUT_S = 5
RECONNECT_WAIT_S = 0.25
PING_INTERVAL_S = 20
JETSTREAM_TIMEOUT_S = 5
OLDEST_SERVER = (2, 12)

# nats-py has no option for it. Reading 32 KB at a time takes a worker 0.4 ms more for a message of 400 KB.
nats.aio.client.DEFAULT_BUFFER_SIZE = 512 * 1024

Role = Literal["api", "inference", "cli"]
"""The owner of an inbox. Each user of deploy/nats/forebay.conf may read the inboxes of its own role only."""

log = logging.getLogger(__name__)


class Connection:
    """A NATS client, its JetStream context, and `requests` for the hot paths.

    `on_reconnect` holds what must be done again after an outage, `on_close` what must be done at the end. `since` is
    when the connection last began or was lost (monotonic seconds). `server` is the URL of the server that it reached
    last, without user and password.
    """

    def __init__(self, client: Client) -> None:
        self.client = client
        self.jetstream: JetStreamContext = client.jetstream(timeout=JETSTREAM_TIMEOUT_S)
        self.requests = Requests(client)
        self.on_reconnect: list[Callable[[], Awaitable[None]]] = []
        self.on_close: list[Callable[[], Awaitable[None]]] = []
        self.errors_before_start: list[Exception] = []
        self.server = ""
        self.up = asyncio.Event()
        self.since = time.monotonic()
        self._started = False

    @property
    def connected(self) -> bool:
        """Whether a message would be sent now."""
        return bool(self.client.is_connected)

    async def start(self, options: dict[str, Any]) -> None:
        """Connect with `options` within CONNECT_TIMEOUT_S; later losses are repaired for ever.

        The first try is bounded, so that a wrong address is an error and not a wait. nats-py itself would try a server
        with an untrusted certificate for ever.
        """
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            await self.client.connect(
                **options,
                allow_reconnect=False,
                max_reconnect_attempts=1,
                disconnected_cb=self._disconnected,
                reconnected_cb=self._reconnected,
                error_cb=self._failed,
            )
        self.client.options.update(allow_reconnect=True, max_reconnect_attempts=-1)
        self._started = True
        self.server = self._connected_server()
        self.since = time.monotonic()
        self.up.set()

    @property
    def age_s(self) -> float:
        """How long there has been no outage: the server cannot have lost what was stored since then."""
        return time.monotonic() - self.since

    async def wait_connected(self, timeout_s: float) -> bool:
        """Wait for a connection, at most `timeout_s`; returns whether there is one."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.up.wait(), timeout_s)
        return self.connected

    async def close(self) -> None:
        """Flush and close. Raises nothing if the server is gone."""
        for action in self.on_close:
            await action()
        try:
            await self.client.flush(timeout=1)
        except Exception as exc:
            log.debug("flush before close: %r", exc)
        try:
            await self.client.close()
        except OSError as exc:
            log.debug("closed a connection that was lost: %r", exc)

    def _connected_server(self) -> str:
        url = self.client.connected_url
        return "" if url is None else _without_secrets(url.geturl())

    async def _disconnected(self) -> None:
        self.up.clear()
        self.since = time.monotonic()
        if not self.client.is_closed:
            log.warning("[RequestQueue] connection to NATS lost; reconnecting until it is back")

    async def _reconnected(self) -> None:
        log.info("[RequestQueue] connected to NATS again")
        self.server = self._connected_server()
        self.since = time.monotonic()
        self.up.set()
        for action in self.on_reconnect:
            await action()

    async def _failed(self, error: Exception) -> None:
        if not self._started:
            self.errors_before_start.append(error)
        # Only this callback hears of refused subjects and slow consumers. `_disconnected` logs a lost connection.
        if self.client.is_connected:
            log.warning("[RequestQueue] NATS: %s", error)


@contextlib.asynccontextmanager
async def connected(settings: Settings, name: str, role: Role = "cli") -> AsyncIterator[Connection]:
    """`connect` for the length of a block."""
    connection = await connect(settings, name, role)
    try:
        yield connection
    finally:
        await connection.close()


async def connect(settings: Settings, name: str, role: Role = "cli") -> Connection:
    """Connect to NATS_URL as `name`. Answers come to inboxes that only users of this `role` may read.

    A lost connection is retried until it is back, with one log line for each change. Nothing is buffered meanwhile
    (`pending_size=0`): a publish fails at once. Otherwise it would be sent after its sender had reported a failure.

    Raises:
        QueueUnavailable: no server can be reached now.
        ConfigurationError: credentials or certificates cannot be used, or the server is older than 2.12.
    """
    url = settings.nats_url or DEFAULT_NATS_URL
    tls = _tls(settings)
    options: dict[str, Any] = {
        "servers": [part.strip() for part in url.split(",")],
        "name": name,
        "reconnect_time_wait": RECONNECT_WAIT_S,
        "connect_timeout": CONNECT_TIMEOUT_S,
        "ping_interval": PING_INTERVAL_S,
        "pending_size": 0,
        "inbox_prefix": f"_INBOX.{role}",
        **_credentials(settings),
    }
    if tls is not None:
        options["tls"] = tls
    connection = Connection(Client())
    try:
        await connection.start(options)
        _check_version(connection.client)
        if tls is not None and not connection.client._server_info.get("tls_required"):
            # The client uses TLS only if the server asks for it. An attacker in between could remove that.
            raise ConfigurationError(f"NATS at {_without_secrets(url)} does not speak TLS, and NATS_TLS_CA wants it")
    except (NatsError, OSError, TimeoutError) as exc:
        await _abandon(connection.client)
        refusals = connection.errors_before_start
        reason = next(filter(_is_of_user, refusals), refusals[-1] if refusals else exc)
        if _is_of_user(reason):
            up = "" if settings.nats_url else "; if `forebay up` started it, set DATA_DIR to the same folder"
            raise ConfigurationError(
                f"NATS at {_without_secrets(url)} refuses this user: set NATS_NKEY_SEED or NATS_CREDENTIALS to a file "
                f"that it knows{up}"
            ) from exc
        raise QueueUnavailable(
            f"cannot reach NATS at {_without_secrets(url)}: {str(reason) or type(reason).__name__}"
        ) from exc
    except ConfigurationError:
        await _abandon(connection.client)
        raise
    return connection


def _is_of_user(error: Exception) -> bool:
    return isinstance(error, AuthorizationError) or "Authorization Violation" in str(error)


async def _abandon(client: Client) -> None:
    # Python 3.11 waits for ever when it closes a connection whose TLS handshake failed.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(1):
            await client.close()


def _credentials(settings: Settings) -> dict[str, str]:
    file = settings.nats_credentials or settings.nats_nkey_seed
    if file is None:
        return {}
    try:
        text = file.read_bytes()
        if settings.nats_nkey_seed is not None:
            nkeys.from_seed(bytearray(text.strip()))
            return {"nkeys_seed": str(file)}
    except OSError as exc:
        raise ConfigurationError(f"the NATS credentials {file} cannot be read: {exc.strerror}") from exc
    except (nkeys.NkeysError, ValueError) as exc:
        raise ConfigurationError(f"NATS_NKEY_SEED={file} holds no NKey seed (a line that begins with SU)") from exc
    if not (b"NATS USER JWT-" in text and b"USER NKEY SEED-" in text):
        raise ConfigurationError(f"the NATS credentials {file} hold no user (JWT and NKey seed)")
    return {"user_credentials": str(file)}


def _tls(settings: Settings) -> ssl.SSLContext | None:
    if settings.nats_tls_ca is None and settings.nats_tls_cert is None:
        return None
    try:
        context = ssl.create_default_context(cafile=settings.nats_tls_ca)
        if settings.nats_tls_cert is not None:
            context.load_cert_chain(settings.nats_tls_cert, settings.nats_tls_key)
    except OSError as exc:
        raise ConfigurationError(f"the TLS files for NATS cannot be used: {exc}") from exc
    return context


def _check_version(client: Client) -> None:
    version = client.connected_server_version
    if (version.major, version.minor) < OLDEST_SERVER:
        raise ConfigurationError(
            f"nats-server {version.major}.{version.minor}.{version.patch} is too old: "
            f"Forebay needs 2.12 or newer (per-message TTL and counters)"
        )


def _without_secrets(url: str) -> str:
    return ",".join(part.split("://")[0] + "://" + part.split("@")[-1].split("://")[-1] for part in url.split(","))
