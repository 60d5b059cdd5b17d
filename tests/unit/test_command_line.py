"""The list of commands: what `forebay --help` prints, and what it costs."""

import asyncio
import contextlib
import fcntl
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import pytest

from forebay_cli.api_client import api_target
from forebay_cli.commands.status import Seen, watching
from forebay_cli.local.running import Running, exclusive, running
from forebay_cli.main import COMMANDS, load
from forebay_cli.nats_connection import target
from forebay_contracts.settings import Settings
from forebay_contracts.settings import load as load_settings
from forebay_contracts.wire.errors import ConfigurationError, QueueUnavailable

SLOW_TO_IMPORT = {"forebay_contracts.settings", "httpx", "nats"}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_says_what_the_command_says(name: str) -> None:
    _, summary = COMMANDS[name]
    assert load(name).help.startswith(summary)


@pytest.mark.parametrize(("argument", "printed"), [("--help", COMMANDS), ("--version", [version("forebay")])])
def test_what_needs_no_command_imports_none(argument: str, printed: Iterable[str]) -> None:
    code = (
        "import sys\n"
        "from forebay_cli.main import app\n"
        f"app([{argument!r}], standalone_mode=False)\n"
        f"sys.exit(' '.join({SLOW_TO_IMPORT!r} & sys.modules.keys()) or 0)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert set(printed) <= set(ended.stdout.split())


@pytest.mark.parametrize("options", [[], ["--data-dir", "."]])
@pytest.mark.parametrize(
    "command",
    ["cancel x", "pause x", "resume x", "drain x", "topology apply", "restore .", "retry x", "api", "inference"],
)
def test_what_changes_something_guesses_no_server(
    command: str, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever answers on the usual port may be another system."""
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    name, *arguments = command.split()
    refused = "no `forebay up` runs on --data-dir" if options else "is named, and no `forebay up` runs on DATA_DIR"
    with pytest.raises(ConfigurationError, match=refused):
        load(name).main([*arguments, *options], standalone_mode=False)


def test_the_nearest_name_of_a_server_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    assert target().named_by is None
    assert api_target(None, None) == ("http://127.0.0.1:8091/v1", None, None)
    settings = load_settings(Settings, nats_url="nats://127.0.0.1:1", nats_nkey_seed=Path("seed"), _env_file=None)
    with exclusive(tmp_path):
        assert target().named_by is None
        Running.of("http://127.0.0.1:2", settings).write(tmp_path)
        found = target()
        assert (found.settings.nats_url, found.named_by) == ("nats://127.0.0.1:1", f"`forebay up` on {tmp_path}")
        assert found.settings.nats_nkey_seed == Path("seed").absolute()
        assert api_target(None, "key") == ("http://127.0.0.1:2/v1", "key", f"`forebay up` on {tmp_path}")
        monkeypatch.setenv("NATS_URL", "nats://127.0.0.1:3")
        monkeypatch.setenv("API_PORT", "4")
        assert (target().settings.nats_url, target().named_by) == ("nats://127.0.0.1:3", "NATS_URL")
        assert api_target(None, None) == ("http://127.0.0.1:4/v1", None, "API_HOST and API_PORT")
        assert target(tmp_path).settings.nats_url == "nats://127.0.0.1:1"
        assert api_target(None, None, tmp_path).url == "http://127.0.0.1:2/v1"
        assert target(tmp_path, "nats://127.0.0.1:5").settings.nats_url == "nats://127.0.0.1:5"
        assert api_target("http://here/openai/v1/", None).url == "http://here/openai/v1"
        assert api_target("http://here:6", None, tmp_path) == ("http://here:6/v1", None, "--base-url")
    # Another command that looks at this moment is no `forebay up`, though the record of the last one is there.
    with (tmp_path / "up.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        assert running(tmp_path) is None
    assert target().named_by == "NATS_URL"


async def test_a_cancellation_that_was_swallowed_ends_a_watch() -> None:
    looked = asyncio.Event()

    async def look() -> Seen:
        if not looked.is_set():
            looked.set()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
        raise QueueUnavailable("nobody answers")

    watch = asyncio.create_task(watching(look, as_json=True))
    await looked.wait()
    watch.cancel()
    done, _ = await asyncio.wait([watch], timeout=5)
    watch.cancel()
    assert done
