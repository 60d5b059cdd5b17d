"""The HTTP server of a worker: its metrics, and its health for probes."""

import asyncio
import concurrent.futures
import json
import logging
import socket
import threading
from collections.abc import Callable
from http.server import ThreadingHTTPServer
from typing import Final

from prometheus_client import MetricsHandler

from forebay_contracts.settings import InferenceSettings
from forebay_contracts.telemetry.metrics import REGISTRY
from forebay_contracts.wire.errors import ConfigurationError
from forebay_inference.health import Health

LOOP_PATIENCE_S: Final = 3.0
"""An event loop that does not answer for so long is stuck: the process sends neither heartbeats nor tokens."""

CONNECTION_TIMEOUT_S: Final = 10.0
"""How long a connection may stay silent."""

log = logging.getLogger(__name__)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, settings: InferenceSettings, port: int, health: Callable[[], Health]) -> None:
        # An IPv6 address needs a socket of its family.
        self.address_family, _, _, _, address = socket.getaddrinfo(
            settings.metrics_host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        super().__init__((str(address[0]), port), _Handler)
        self.metrics = settings.metrics
        self._health = health
        self._loop = asyncio.get_running_loop()

    def health(self) -> Health | None:
        """The worker's health, None if its event loop does not answer."""

        async def ask() -> Health:
            return self._health()

        asked = asyncio.run_coroutine_threadsafe(ask(), self._loop)
        try:
            return asked.result(LOOP_PATIENCE_S)
        except concurrent.futures.TimeoutError:
            asked.cancel()
            return None


class _Handler(MetricsHandler):
    server: _Server
    registry = REGISTRY
    timeout = CONNECTION_TIMEOUT_S

    def do_GET(self) -> None:  # noqa: N802
        match self.path.partition("?")[0]:
            case "/health/live":
                self._answer_health(live=True)
            case "/health/ready":
                self._answer_health(live=False)
            case "/metrics" if self.server.metrics:
                super().do_GET()
            case _:
                self.send_error(404)

    def _answer_health(self, *, live: bool) -> None:
        health = self.server.health()
        if health is None:
            ok, found = False, {"status": "stuck", "fault": "the event loop does not answer"}
        else:
            ok = health.live if live else health.ready
            nats = "connected" if health.nats_connected else "disconnected"
            found = {"status": health.status, "nats": nats} | ({"fault": health.fault} if health.fault else {})
        body = json.dumps(found).encode()
        self.send_response(200 if ok else 503)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def serve(settings: InferenceSettings, health: Callable[[], Health]) -> int | None:
    """Serve on METRICS_PORT from threads, until the process ends; the port, None where METRICS_PORT is not set.

    The paths are `/metrics` (not with METRICS=false), `/health/live` and `/health/ready`. `health` is called on the
    running event loop; if that does not answer, the worker is not healthy.

    Raises:
        ConfigurationError: the port is taken or not allowed.
    """
    if settings.metrics_port is None:
        return None
    try:
        server = _Server(settings, settings.metrics_port, health)
    except OSError as exc:
        where = f"{settings.metrics_host}:{settings.metrics_port}"
        raise ConfigurationError(f"cannot serve metrics on {where}: {exc.strerror or exc}") from exc
    threading.Thread(target=server.serve_forever, daemon=True, name="exposition").start()
    what = "metrics" if settings.metrics else "health"
    log.info("[RequestQueue] %s on %s:%d", what, settings.metrics_host, server.server_port)
    return server.server_port
