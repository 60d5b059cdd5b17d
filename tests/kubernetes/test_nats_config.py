"""The servers of each overlay, started for real from the rendered ConfigMaps with local addresses; the topology job."""

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from forebay_contracts.nats import streams
from forebay_contracts.settings import Settings, load
from forebay_contracts.wire import names
from support.manifests import DEPLOY, Manifests
from support.nats import nats_server_binary
from support.ports import port_of

START_TIMEOUT_S = 30
STORE_BYTES = 16 * 2**30  # MAX_STORE of site.conf


class Server:
    """One pod of the StatefulSet as a process of this machine."""

    def __init__(self, folder: Path, number: int) -> None:
        self.name = f"nats-{number}"
        self.ports = {port: port_of(self) for port in ("nats", "cluster", "monitor")}
        self.folder = folder / self.name
        (self.folder / "run").mkdir(parents=True)

    def configure(self, manifests: Manifests, secrets: Path, routes: dict[str, int]) -> None:
        """Write the files of the ConfigMaps, paths and addresses replaced."""
        files = manifests.config("nats-forebay") | manifests.config("nats-config")
        replaced = {
            "/etc/nats-tls/tls.crt": str(secrets / "server.pem"),
            "/etc/nats-tls/tls.key": str(secrets / "server.key"),
            "/etc/nats-tls/ca.crt": str(secrets / "ca.pem"),
            '"/data"': f'"{self.folder}/data"',
            "/run/nats": str(self.folder / "run"),
            "port: 4222": f"host: 127.0.0.1\nport: {self.ports['nats']}",
            "http_port: 8222": f'http: "127.0.0.1:{self.ports["monitor"]}"',
            "  port: 6222": f"  host: 127.0.0.1\n  port: {self.ports['cluster']}",
        } | {f"{name}.nats-headless:6222": f"127.0.0.1:{port}" for name, port in routes.items()}
        for name, text in files.items():
            for old, new in replaced.items():
                text = text.replace(old, new)
            (self.folder / name).write_text(text)

    def command(self, manifests: Manifests) -> list[str]:
        """The container's, with the files where they are here."""
        args = manifests.workload("nats").container["args"]
        return [nats_server_binary(), *(arg.replace("/etc/nats", str(self.folder)) for arg in args)]


@contextlib.contextmanager
def servers(manifests: Manifests, folder: Path) -> Iterator[tuple[list[Server], Path]]:
    secrets = folder / "secrets"
    init = DEPLOY.parent / "nats" / "init.py"
    subprocess.run([sys.executable, str(init), str(secrets)], check=True, capture_output=True, timeout=60)
    keys = [line.split(": ") for line in (secrets / "site.conf").read_text().splitlines() if "_KEY: " in line]
    count = manifests.one("StatefulSet", "nats")["spec"]["replicas"]
    found = [Server(folder, number) for number in range(count)]
    processes = []
    for server in found:
        server.configure(manifests, secrets, {one.name: one.ports["cluster"] for one in found})
        env = os.environ | dict(keys) | {"SERVER_NAME": server.name}
        log = (server.folder / "log").open("wb")
        processes.append(subprocess.Popen(server.command(manifests), env=env, stdout=log, stderr=log))
        log.close()
    try:
        yield found, secrets
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(START_TIMEOUT_S)


async def healthy(http: httpx.AsyncClient, server: Server, path: str) -> None:
    """Ask until the server says yes, as a kubelet does."""
    async with asyncio.timeout(START_TIMEOUT_S):
        while True:
            with contextlib.suppress(httpx.TransportError):
                if (await http.get(f"http://127.0.0.1:{server.ports['monitor']}{path}")).status_code == 200:
                    return
            assert server.folder.exists()
            await asyncio.sleep(0.05)


async def test_servers_form_what_the_job_needs(
    manifests: Manifests, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        found, secrets = stack.enter_context(servers(manifests, tmp_path))
        http = await stack.enter_async_context(httpx.AsyncClient())
        container = manifests.workload("nats").container
        for server in found:
            for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
                await healthy(http, server, container[kind]["httpGet"]["path"])

        settings = manifests.environment("forebay-topology") | {
            "NATS_URL": ",".join(f"tls://127.0.0.1:{server.ports['nats']}" for server in found),
            "NATS_TLS_CA": str(secrets / "ca.pem"),
            "NATS_NKEY_SEED": str(secrets / "admin.seed"),
        }
        args = manifests.workload("forebay-topology").container["args"]
        job = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "forebay_cli", *args, env=os.environ | settings, stdout=-1, stderr=-2
        )
        output, _ = await asyncio.wait_for(job.communicate(), 60)
        assert job.returncode == 0, output.decode()

        # What the scaler of KEDA asks, of every server below the headless Service, and what it looks for there.
        for name, value in manifests.environment("forebay-topology").items():
            monkeypatch.setenv(name, value)
        loaded = load(Settings, _env_file=None)
        token = names.model_token(loaded.served_model)
        seen = set()
        for server in found:
            answer = await http.get(
                f"http://127.0.0.1:{server.ports['monitor']}/jsz?acc=FOREBAY&consumers=true&config=true"
            )
            for account in answer.json()["account_details"]:
                for stream in account["stream_detail"]:
                    assert stream["config"]["num_replicas"] == loaded.nats_replicas == len(found)
                    if stream["name"] == names.STREAM:
                        assert stream["config"]["max_bytes"] == int(STORE_BYTES // len(found) * streams.QUEUE_SHARE)
                    if stream["name"] == names.ANSWERS:
                        assert stream["config"]["max_bytes"] == loaded.answer_log_bytes
                    for consumer in stream.get("consumer_detail") or ():
                        seen.add((account["name"], stream["name"], consumer["name"]))
                        assert consumer["num_pending"] + consumer["num_ack_pending"] == 0
        assert seen == {
            ("FOREBAY", names.STREAM, token),
            ("FOREBAY", names.BATCHES, names.BATCHES_CONSUMER),
            ("FOREBAY", names.WEBHOOKS, names.WEBHOOKS_CONSUMER),
        }
        for scaled in manifests.of("ScaledObject"):
            metadata = scaled["spec"]["triggers"][0]["metadata"]
            assert (metadata["account"], metadata["stream"], metadata["consumer"]) in seen
