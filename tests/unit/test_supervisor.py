import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from forebay_cli.local import supervisor
from forebay_cli.local.supervisor import ChildDied, LogFile, Supervisor

pytestmark = pytest.mark.timeout(90)


class Console:
    """What would have been shown."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, child: str, line: str) -> None:
        self.lines.append(f"{child}: {line}")


@contextlib.asynccontextmanager
async def supervising(folder: Path, console: Console) -> AsyncIterator[Supervisor]:
    made = Supervisor(folder, console)
    try:
        yield made
    finally:
        made.kill()
        await made.drain(lambda child: 30)


def python(code: str) -> list[str]:
    return [sys.executable, "-u", "-c", code]


async def test_only_warnings_and_errors_reach_the_console(tmp_path: Path) -> None:
    lines = [
        "2026-01-01 00:00:00,000 INFO    nothing of note",
        "2026-01-01 00:00:00,000 ERROR   it broke",
        "Traceback (most recent call last):",
        '{"time": "2026-01-01T00:00:00.000Z", "level": "INFO", "message": "fine"}',
        '{"time": "2026-01-01T00:00:00.000Z", "level": "WARNING", "message": "hm"}',
        "[1] 2026/01/01 00:00:00.000000 [INF] Server is ready",
        "and more of that",
        "[1] 2026/01/01 00:00:00.000000 [ERR] disk full",
    ]
    console = Console()
    async with supervising(tmp_path, console) as children:
        child = await children.start("it", python(f"print({chr(10).join(lines)!r}, end='')"), os.environ, stage=0)
        assert await child.ended == 0
    assert console.lines == [f"it: {lines[number]}" for number in (1, 2, 4, 7)]
    assert (tmp_path / "it.log").read_text() == "\n".join(lines)
    assert list(child.last_lines) == lines


async def test_a_death_names_the_child_and_its_last_lines(tmp_path: Path) -> None:
    async with supervising(tmp_path, Console()) as children:
        await children.start("other", python("import time; time.sleep(60)"), os.environ, stage=0)
        await children.start("it", python("print('so long'); exit(7)"), os.environ, stage=0)
        with pytest.raises(ChildDied, match=r"^it ended with exit code 7; its last lines \(.*it\.log\):\n    so long$"):
            await children.failure()


async def test_a_child_that_starts_later_is_watched_too(tmp_path: Path) -> None:
    async with supervising(tmp_path, Console()) as children:
        failure = asyncio.create_task(children.failure())
        await asyncio.sleep(0)
        await children.start("it", python("exit(1)"), os.environ, stage=0)
        with pytest.raises(ChildDied, match="it ended with exit code 1"):
            await failure


async def test_the_last_stage_ends_first(tmp_path: Path) -> None:
    order = tmp_path / "order"
    code = (
        "import signal, sys\n"
        "def end(*_):\n"
        "    open({order!r}, 'a').write({name!r} + '\\n')\n"
        "    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "print('ready')\n"
        "while True: signal.pause()"
    )
    async with supervising(tmp_path, Console()) as children:
        for stage, name in enumerate(("first", "second", "third")):
            command = python(code.format(order=str(order), name=name))
            child = await children.start(name, command, os.environ, stage=stage)
            await child.said(b"ready")
        assert await children.drain(lambda child: 30) == []
    assert order.read_text().split() == ["third", "second", "first"]


async def test_who_does_not_end_is_killed_and_named(tmp_path: Path) -> None:
    code = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('ready')\nwhile True: signal.pause()"
    async with supervising(tmp_path, Console()) as children:
        child = await children.start("it", python(code), os.environ, stage=0)
        await child.said(b"ready")
        assert await children.drain(lambda child: 0.1) == ["it did not end within 0.1 s and was killed"]


async def test_what_a_child_leaves_behind_is_ended(tmp_path: Path) -> None:
    code = "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    async with supervising(tmp_path, Console()) as children:
        child = await children.start("it", python(code), os.environ, stage=0)
        # What is left holds the child's output open: the end of that is the end of both.
        async with asyncio.timeout(30):
            assert await child.ended == 0


def test_a_full_disk_costs_log_lines_alone() -> None:
    log = LogFile(Path("/dev/full"))
    log.write(b"a line\n")
    log.close()


def test_a_log_file_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "MAX_LOG_BYTES", 100)
    log = LogFile(tmp_path / "it.log")
    for number in range(30):
        log.write(b"%09d\n" % number)
    log.close()
    assert (tmp_path / "it.log").stat().st_size <= 100
    assert (tmp_path / "it.log.1").stat().st_size <= 100
    assert (tmp_path / "it.log").read_text().endswith("000000029\n")
