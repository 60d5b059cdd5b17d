"""The NATS server of `forebay up` answers its owner alone."""

import asyncio
import json
import stat
from pathlib import Path

import psutil
import pytest

from forebay_cli.commands import services
from forebay_cli.local import nats_server
from forebay_cli.local.running import exclusive, running
from forebay_contracts.nats import connection as connection_module
from forebay_contracts.nats.connection import connect
from forebay_contracts.settings import Settings, load
from forebay_contracts.wire.errors import ConfigurationError
from support.command import Up, forebay, up

pytestmark = [pytest.mark.timeout(180), pytest.mark.usefixtures("usual_port_is_taken")]


async def refused(url: str, **settings: object) -> bool:
    """Whether the server lets nobody in with these settings."""
    try:
        connection = await connect(load(Settings, nats_url=url, _env_file=None, **settings), "forebay-tests")
    except ConfigurationError as exc:
        return "refuses this user" in str(exc)
    await connection.close()
    return False


def visible_to_others(running: Up) -> str:
    """The command lines of all processes, what other users may read, and our environments, which they may not."""
    processes = [psutil.Process(running.process.pid), *running.children()]
    return " ".join(" ".join([*process.cmdline(), *process.environ().values()]) for process in processes)


async def test_only_the_owner_is_let_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "nats"
    async with up(tmp_path) as running:
        context = json.loads((folder / "context.json").read_text())
        url = (folder / "url").read_text().strip()
        another = tmp_path / "another.seed"
        another.write_text("SUANQ7NCZMUCZNRRE3PCD7WYWW2BMYGRW2OMNHTYX5FHFH5L5PCI6DIIMU")
        assert await refused(url)
        assert await refused(url.replace("//", "//forebay:@"))
        assert await refused(url, nats_nkey_seed=another)

        # The api and the worker are in, and so are our commands and the context of `nats`.
        assert (await running.chat("[[tokens=1]]")).status_code == 200
        assert (await forebay("status", "--json", data_dir=tmp_path)).json()["workers"][0]["status"] == "ready"
        found = (await forebay("doctor", "--json", data_dir=tmp_path)).json()
        assert {one["check"] for one in found if one["severity"] == "problem"} <= {"disk"}
        assert context["url"] == url
        assert context["inbox_prefix"] == "_INBOX.cli"
        assert not await refused(url, nats_nkey_seed=context["nkey"])
        # A command with another DATA_DIR is told which one it needs, if it comes to the usual port.
        monkeypatch.setattr(connection_module, "DEFAULT_NATS_URL", url)
        with pytest.raises(ConfigurationError, match="set DATA_DIR to the same folder"):
            await connect(load(Settings, _env_file=None), "forebay-tests")
        # A service that is started beside it, too.
        monkeypatch.setenv("DATA_DIR", str(tmp_path))
        monkeypatch.delenv("NATS_URL", raising=False)
        assert services._with_nats() == {"NATS_URL": url, "NATS_NKEY_SEED": str(folder / "user.seed")}

        seed = (folder / "user.seed").read_text().strip()
        logs = "".join(path.read_text() for path in (tmp_path / "logs").iterdir())
        for text in (visible_to_others(running), logs, "".join(running.stderr), (folder / "server.conf").read_text()):
            assert seed not in text
        (server,) = running.children("nats-server")
        listening = [one.laddr for one in server.net_connections() if one.status == psutil.CONN_LISTEN]
        assert [(at.ip, f"nats://127.0.0.1:{at.port}") for at in listening] == [("127.0.0.1", url)]
        running.process.terminate()
        assert (await running.ended()).code == 0

    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    files = ("user.seed", "context.json", "server.conf", "url")
    assert {stat.S_IMODE((folder / name).stat().st_mode) for name in files} == {0o600}


def test_a_folder_of_an_earlier_version_gets_a_user_and_keeps_it(tmp_path: Path) -> None:
    folder = tmp_path / "nats"
    folder.mkdir(mode=0o755)
    _, access = nats_server.prepare(tmp_path, 900_000)
    seed: Path = access["nats_nkey_seed"]
    first = seed.read_text()
    seed.chmod(0o644)
    nats_server.prepare(tmp_path, 900_000)
    assert (seed.read_text(), stat.S_IMODE(seed.stat().st_mode)) == (first, 0o600)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for broken in ("", "SU", "not a seed", first[:-1], "SAANQ7NCZMUCZNRRE3PCD7WYWW2BMYGRW2OMNHTYX5FHFH5L5PCI6DIIMU"):
        seed.write_text(broken)
        nats_server.prepare(tmp_path, 900_000)
        assert seed.read_text().startswith("SU")
        assert len(seed.read_text()) == len(first)
    assert not list(folder.glob("tmp*"))


async def test_credentials_of_another_server_are_refused(tmp_path: Path) -> None:
    ended = await forebay("up", data_dir=tmp_path, nats_nkey_seed=tmp_path / "own.seed")
    assert (ended.code, ended.stderr.count("\n")) == (2, 1)
    assert ended.stderr.startswith("forebay: NATS_CREDENTIALS and NATS_NKEY_SEED need NATS_URL")


async def test_the_server_of_another_user_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with exclusive(tmp_path):
        (tmp_path / "nats").mkdir()

        def denied(path: Path) -> str:
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(Path, "read_text", denied)  # root may read everything
        with pytest.raises(ConfigurationError, match="belongs to another user"):
            await asyncio.to_thread(running, tmp_path)
