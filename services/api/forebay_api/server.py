"""The api as processes: one, or several on one listener, until SIGTERM or SIGINT."""

import asyncio
import functools
import logging
import math
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
from multiprocessing.connection import wait
from types import FrameType

import uvicorn
import uvloop

from forebay_api.app import create_app, running
from forebay_api.context import Context
from forebay_api.http.protocol import BoundedHttp
from forebay_api.http.websocket import DrainedWebSocket
from forebay_api.watching.exposition import MULTIPROCESS_DIR
from forebay_contracts.process import calm_collector, die_with_parent, raise_file_limit
from forebay_contracts.settings import ApiSettings, load
from forebay_contracts.telemetry import logs, metrics, tracing
from forebay_contracts.wire.errors import ConfigurationError, ForebayError

KEEP_ALIVE_S = 75
MAX_CONNECTIONS = 20_000
"""Most connections of one api process, idle ones included; one more is answered 503 and closed."""
SPARE_FILES = 256
BACKLOG = 4096

log = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """uvicorn's server. After a signal it serves on for SHUTDOWN_DELAY, but is not ready any more."""

    def __init__(self, config: uvicorn.Config, context: Context) -> None:
        super().__init__(config)
        self._context = context
        self._loop = asyncio.get_running_loop()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the feed first: uvicorn waits for open connections, and listeners never leave by themselves."""
        await self._context.feed.close()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Be unready for SHUTDOWN_DELAY, then stop; a second signal stops at once."""
        delay_s = self._context.settings.shutdown_delay
        leave = functools.partial(super().handle_exit, sig, frame)
        if delay_s and not self._context.draining:
            self._context.draining = True
            self._loop.call_soon_threadsafe(self._loop.call_later, delay_s, leave)
        else:
            leave()


def configure(settings: ApiSettings) -> None:
    """Set up logs, metrics and traces of this process, before anything else is built."""
    logs.configure(settings)
    metrics.configure(settings)
    tracing.configure("forebay-api")


async def serve(settings: ApiSettings, sockets: list[socket.socket]) -> None:
    """Connect to NATS, then serve on `sockets` until a signal."""
    raise_file_limit(MAX_CONNECTIONS + SPARE_FILES)
    async with running(settings) as context:
        calm_collector()
        config = uvicorn.Config(
            create_app(context),
            loop="uvloop",
            http=functools.partial(BoundedHttp, body_timeout_s=settings.body_timeout),  # type: ignore[arg-type]
            ws=DrainedWebSocket,
            ws_max_size=settings.max_request_bytes,
            ws_per_message_deflate=False,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            limit_concurrency=MAX_CONNECTIONS,
            backlog=BACKLOG,
            timeout_graceful_shutdown=math.ceil(settings.drain_timeout),
        )
        await Server(config, context).serve(sockets)


def process(listener: socket.socket, parent: int) -> None:
    """The main function of each of several api processes."""
    die_with_parent(parent)
    settings = load(ApiSettings)
    configure(settings)
    sys.exit(_guarded(settings, listener))


def main() -> int:
    """Serve; the exit status."""
    try:
        settings = load(ApiSettings)
        configure(settings)
    except ForebayError as exc:
        return _report(exc)
    try:
        listener = _listen(settings)
    except OSError as exc:
        return _report(ConfigurationError(f"cannot listen on {settings.api_host}:{settings.api_port}: {exc.strerror}"))
    # With API_PORT=0 the system chooses the port.
    log.info("[RequestQueue] listening on %s:%d", settings.api_host, listener.getsockname()[1])
    if settings.api_processes > 1:
        with tempfile.TemporaryDirectory(prefix="forebay-metrics-") as shared:
            # Read by prometheus_client on import: the children count in files, which each of them can sum up.
            os.environ.setdefault(MULTIPROCESS_DIR, shared)
            return _supervise(settings.api_processes, listener)
    return _guarded(settings, listener)


def _supervise(count: int, listener: socket.socket) -> int:
    """Run `count` processes on one listener. When one ends, all end, so that whoever started this one sees it."""
    spawn = multiprocessing.get_context("spawn")
    children = [
        spawn.Process(target=process, args=(listener, os.getpid()), name=f"api-{number}") for number in range(count)
    ]
    for child in children:
        child.start()

    def stop(_signal: int, _frame: FrameType | None) -> None:
        for child in children:
            child.terminate()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    wait([child.sentinel for child in children])
    stop(signal.SIGTERM, None)
    for child in children:
        child.join()
    return max(abs(child.exitcode or 0) for child in children)


def _guarded(settings: ApiSettings, listener: socket.socket) -> int:
    """Serve until a signal; the exit status."""
    # uvicorn raises the signal again once it has drained, but a drained process ends with 0.
    for ending in (signal.SIGTERM, signal.SIGINT):
        signal.signal(ending, lambda *_: None)
    try:
        uvloop.run(serve(settings, [listener]))
    except ForebayError as exc:
        return _report(exc)
    except asyncio.CancelledError:
        pass
    return 0


def _report(error: ForebayError) -> int:
    logs.write_out()
    print(f"forebay api: {error}", file=sys.stderr)
    return 2 if isinstance(error, ConfigurationError) else 1


def _listen(settings: ApiSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.api_host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((settings.api_host, settings.api_port))
    # From here on the system accepts connections; they wait until the api has started.
    listener.listen(BACKLOG)
    return listener
