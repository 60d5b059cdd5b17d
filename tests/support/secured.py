"""A nats-server with deploy/nats/forebay.conf, and the system on it: each process with the key of its role."""

import asyncio
import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import nats
from nats.aio.client import Client

from forebay_contracts.nats.connection import Connection, _tls, connect
from forebay_contracts.settings import Settings, load
from support.cluster import Cluster
from support.nats import NatsServer
from support.service import Api, Worker
from support.stack import Stack, started

DEPLOY = Path(__file__).parents[2] / "deploy" / "nats"
ROLES = ("api", "inference", "operator", "admin")
INBOX = {"api": "_INBOX.api", "inference": "_INBOX.inference", "operator": "_INBOX.cli", "admin": "_INBOX.cli"}


def init(folder: Path, *options: str) -> None:
    """Make keys, certificates and site.conf as docs/security-nats.md says."""
    subprocess.run([sys.executable, str(DEPLOY / "init.py"), str(folder), *options], check=True, capture_output=True)
    # Of the test's own: the monitoring port must not be one that another server has.
    site = folder / "site.conf"
    site.write_text("".join(line for line in site.read_text().splitlines(True) if not line.startswith("http:")))


class Site:
    """A server with the configuration of the folder, and the settings of each role for it."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        init(folder, *options)
        self.server = NatsServer(folder, "-c", str(folder / "forebay.conf"))

    @property
    def url(self) -> str:
        """What NATS_URL must be."""
        return self.server.url.replace("nats://127.0.0.1", "tls://localhost")

    def settings(self, role: str) -> dict[str, Any]:
        """What lets a process be `role`."""
        return {
            "nats_url": self.url,
            "nats_tls_ca": self.folder / "ca.pem",
            "nats_nkey_seed": self.folder / f"{role}.seed",
        }

    async def connect(self, role: str, **settings: Any) -> Connection:
        """A connection of ours as `role`."""
        inbox: Any = role if role in ("api", "inference") else "cli"
        return await connect(load(Settings, **self.settings(role) | settings, _env_file=None), "tests", inbox)

    @contextlib.asynccontextmanager
    async def client(self, role: str) -> AsyncIterator[tuple[Client, list[str], asyncio.Event]]:
        """A plain NATS client as `role`, and the refusals that the server tells it, with an event at each."""
        refusals: list[str] = []
        heard = asyncio.Event()

        async def refused(error: Exception) -> None:
            refusals.append(str(error))
            heard.set()

        context = _tls(load(Settings, **self.settings(role), _env_file=None))
        client = await nats.connect(
            self.url,
            tls=context,
            nkeys_seed=str(self.folder / f"{role}.seed"),
            error_cb=refused,
            inbox_prefix=INBOX[role],
        )
        try:
            yield client, refusals, heard
        finally:
            await client.close()

    async def forebay(self, role: str, *arguments: str, **settings: Any) -> tuple[int | None, str]:
        """Run the command as `role`: its exit code, and what it printed."""
        values = self.settings(role) | {"data_dir": self.folder / "data"} | settings
        env = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
        env |= {"HOME": str(self.folder), "COLUMNS": "300"}
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "forebay_cli",
            *arguments,
            env=env | {name.upper(): str(value) for name, value in values.items()},
            cwd=self.folder,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        async with asyncio.timeout(60):
            printed, _ = await process.communicate()
        return process.returncode, re.sub(r"^server: .*\n", "", printed.decode(), flags=re.MULTILINE)


class ClusteredSite(Site):
    """The same configuration on each server of `cluster`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.cluster = Cluster(folder, self._options)

    def _options(self, name: str) -> tuple[str, ...]:
        own = self.folder / name
        own.mkdir()
        shutil.copy(self.folder / "forebay.conf", own)
        site = (self.folder / "site.conf").read_text()
        (own / "site.conf").write_text(site.replace(f'"{self.folder}/store"', f'"{own}/store"'))
        return "-c", str(own / "forebay.conf")

    @property
    def url(self) -> str:
        """All servers."""
        return self.cluster.url.replace("nats://127.0.0.1", "tls://localhost")


class SecuredStack(Stack):
    """A stack whose processes have the keys of their roles."""

    nats: Site

    async def api(self, **settings: Any) -> Api:
        """Start another api as `api`."""
        return await super().api(**self.nats.settings("api") | settings)

    async def launched_worker(self, **settings: Any) -> Worker:
        """Launch another worker as `inference`."""
        return await super().launched_worker(**self.nats.settings("inference") | settings)


@contextlib.asynccontextmanager
async def running(site: Site, *, apis: int = 1, workers: int = 1, **settings: Any) -> AsyncIterator[SecuredStack]:
    """The topology applied by `admin`, then apis and workers; what the tests look at, they look at as `admin`."""
    code, printed = await site.forebay("admin", "topology", "apply", **settings)
    assert code == 0, printed
    async with started(SecuredStack(site, **settings), apis, workers, lambda: site.connect("admin")) as stack:
        yield stack
