"""A NATS cluster of three servers on the loopback interface."""

import asyncio
from collections.abc import Callable
from pathlib import Path

from support.nats import NatsServer
from support.ports import port_of


class Cluster:
    """Three servers with JetStream, each with the further options for its name; `url` names them all."""

    def __init__(self, store: Path, options: Callable[[str], tuple[str, ...]] = lambda name: ()) -> None:
        ports = [port_of(self) for _ in range(3)]
        routes = ",".join(f"nats://127.0.0.1:{port}" for port in ports)
        self.servers = [
            NatsServer(
                store / f"n{number}",
                "-n",
                f"n{number}",
                "--cluster_name",
                "test",
                "--cluster",
                f"nats://127.0.0.1:{port}",
                "--routes",
                routes,
                *options(f"n{number}"),
            )
            for number, port in enumerate(ports)
        ]

    @property
    def url(self) -> str:
        """All servers, for NATS_URL."""
        return ",".join(server.url for server in self.servers)

    async def start(self) -> "Cluster":
        """Start all at once: none is ready before two are."""
        await asyncio.gather(*(asyncio.to_thread(server.start) for server in self.servers))
        return self

    async def stop(self) -> None:
        """End all."""
        await asyncio.gather(*(asyncio.to_thread(server.stop) for server in self.servers))

    def by_name(self, name: str) -> NatsServer:
        """The server that calls itself so."""
        return self.servers[int(name.removeprefix("n"))]
