"""The list of commands: what `forebay --help` prints, and what it costs."""

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import version

import pytest

from forebay_cli.commands.status import Seen, watching
from forebay_cli.main import COMMANDS, load
from forebay_contracts.wire.errors import QueueUnavailable

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
