"""`forebay backup` and `forebay restore`: what is stored moves to another, empty server, and is as it was there."""

import json
import stat
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from forebay_cli import snapshots
from forebay_cli.commands.backup import backup, restore
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import ConfigurationError
from forebay_contracts.wire.state import RequestStatus
from support.nats import NatsServer
from support.stack import MODEL, Stack, running

START = Callable[[Path], AbstractContextManager[NatsServer]]
CONTENT = b'{"a": 1}\n' * 50_000
"""450 KB: several chunks."""


async def run(command: Any, monkeypatch: pytest.MonkeyPatch, nats: NatsServer, *arguments: Any) -> None:
    """A command in this process."""
    monkeypatch.setenv("NATS_URL", nats.url)
    await command.__wrapped__(*arguments)


async def completed(stack: Stack) -> int:
    subject = names.counter_subject(RequestStatus.COMPLETED)
    message = await stack.connection.jetstream.get_last_msg(names.COUNTERS, subject)
    return int(json.loads(message.data or b"{}")["val"])


async def test_what_is_stored_moves_to_another_server(
    nats_server: NatsServer, start_nats: START, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = tmp_path / "saved"
    async with running(nats_server) as stack:
        client = stack.openai()
        response = await client.responses.create(model=MODEL, input="[[tokens=5]]")
        file = await client.files.create(file=("in.jsonl", CONTENT), purpose="batch")
        await stack.workers[0].stop()
        waits = await client.responses.create(model=MODEL, input="[[tokens=3]]", background=True)
        await run(backup, monkeypatch, nats_server, saved)
        with pytest.raises(ConfigurationError, match=r"apis: 1, workers: 0"):
            await run(restore, monkeypatch, nats_server, saved)
        counted = await completed(stack)
    assert {stat.S_IMODE(place.stat().st_mode) for place in (saved, *saved.glob("*/"))} == {0o700}
    with pytest.raises(ConfigurationError, match="is not empty"):
        await run(backup, monkeypatch, nats_server, saved)

    with start_nats(tmp_path / "other") as other:
        await run(restore, monkeypatch, other, saved)
        with pytest.raises(ConfigurationError, match=r"INFERENCE, .*already on this NATS"):
            await run(restore, monkeypatch, other, saved)
        await run(restore, monkeypatch, other, saved, True)
        async with running(other) as stack:
            client = stack.openai()
            assert (await client.responses.retrieve(response.id)).output_text == response.output_text
            assert (await client.files.content(file.id)).content == CONTENT
            async for event in await client.responses.retrieve(waits.id, stream=True):
                last = event
            assert last.type == "response.completed"
            assert last.response.output_text
            assert await completed(stack) == counted + 1


def test_a_folder_without_a_whole_backup_is_refused(tmp_path: Path) -> None:
    (tmp_path / "INFERENCE").mkdir()
    (tmp_path / "INFERENCE" / "backup.json").write_text("{}")
    with pytest.raises(ConfigurationError, match="holds no whole backup"):
        snapshots.saved_in(tmp_path)
    snapshots.finish(tmp_path, [snapshots.Saved("INFERENCE", 1, 1)])
    with pytest.raises(ConfigurationError, match="cannot be read as a backup"):
        snapshots.saved_in(tmp_path)
