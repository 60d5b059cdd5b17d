"""The commands and programs of the docs, one after another as a reader runs them, on one running system."""

import asyncio
import contextlib
import io
import os
import re
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from support.docs import PAGES, ROOT, commands, programs
from support.stack import Stack, running

pytestmark = pytest.mark.asyncio(loop_scope="module")

SECOND = "Qwen/Qwen2.5-1.5B-Instruct"
PRELUDE = f"""
set -eo pipefail
curl() {{ command curl --fail-with-body -sS "$@"; }}
forebay() {{ case $1 in up|api|inference|fetch|run) ;; *) {sys.executable} -m forebay_cli "$@" </dev/null;; esac; }}
"""
"""The services run already: that `forebay up` and the like take what they are given is a unit test."""

SAID = {
    "first-answer": ["t0 t1 t2", '"queue_size":0', f'"id":"{SECOND}"', " ready ", " completed "],
    "two-models": ["Qwen2.5-1.5B-Instruct", f'"id":"{SECOND}"'],
    "batches": ['"completed"', '"custom_id":"a"'],
    "usage": ['"object":"list"', '"data":'],
}
"""Of each page, some of what its commands print."""

ELSEWHERE = {
    "README": "integration/test_nats_page.py",
    "backup": "integration/test_backup.py",
    "clients": "clients/test_coding_agents.py",
    "containers": "containers/test_compose.py",
    "engines": "integration/test_up_llamacpp.py",
    "kubernetes": "kubernetes/test_manifests.py",
    "models": "integration/test_rerank_model.py",
    "nats-cli": "integration/test_nats_page.py",
    "own-nats": "deploy/test_own_nats.py",
    "security-nats": "security/test_nats_roles_at_work.py",
    "sizing": "unit/test_docs_commands.py",
    "systemd": "deploy/test_systemd.py",
    "vllm": "vllm/test_vllm.py",
}
"""Pages whose commands need more than a running system, or change it: what follows them."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(start_nats: Any, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    with start_nats(tmp_path_factory.mktemp("nats")) as nats:
        async with running(nats, default_model="HuggingFaceTB/SmolLM2-135M-Instruct") as stack:
            await stack.worker(default_model=SECOND)
            await stack.knows_workers()
            yield stack


def here(text: str, stack: Stack) -> str:
    """The text with the address of this api."""
    return re.sub(r"http://(localhost|127\.0\.0\.1):8091", stack.apis[0].url, text)


async def ended(stack: Stack) -> None:
    """Wait until nothing is under way: a reader looks at a batch again when it has ended."""
    await stack.idle()
    async with asyncio.timeout(60):
        while True:
            batches = (await stack.http.get(f"{stack.apis[0].url}/v1/batches")).json()["data"]
            if all(batch["status"] in ("completed", "failed", "expired", "cancelled") for batch in batches):
                return
            await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def shell(stack: Stack, folder: Path) -> AsyncIterator[Any]:
    """Runs commands in one shell, each once all that the ones before it have asked for is done."""
    env = os.environ | {"NATS_URL": stack.nats.url, "DATA_DIR": str(folder), "COLUMNS": "200"}
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        "bash", stdin=pipe, stdout=pipe, stderr=asyncio.subprocess.STDOUT, cwd=folder, env=env
    )
    assert process.stdin is not None
    assert process.stdout is not None

    async def run(command: str) -> str:
        process.stdin.write(f"{command}\necho; echo --done--\n".encode())
        said = ""
        async with asyncio.timeout(60):
            while not said.endswith("--done--\n"):
                line = await process.stdout.readline()
                assert line, f"{command}\n{said}"
                said += line.decode()
        await ended(stack)
        return said

    try:
        await run(PRELUDE)
        yield run
    finally:
        process.stdin.close()
        await process.wait()


async def test_the_commands_of_every_page_are_followed_somewhere() -> None:
    assert {page.stem for page in PAGES if commands(page)} - SAID.keys() - ELSEWHERE.keys() == set()
    assert [test for test in ELSEWHERE.values() if not (ROOT / "tests" / test).exists()] == []


@pytest.mark.parametrize("page", SAID)
async def test_the_commands_of_a_page(page: str, stack: Stack, tmp_path: Path) -> None:
    source = ROOT / "docs" / f"{page}.md"
    if example := re.search(r'^ {4}(\{"custom_id".*)$', source.read_text(), re.MULTILINE):
        (tmp_path / "in.jsonl").write_text(example[1] + "\n")
    async with shell(stack, tmp_path) as run:
        said = [await run(here(command, stack)) for command in commands(source)]
    printed = "".join(said)
    for wanted in SAID[page]:
        assert re.search(wanted, printed), (wanted, printed)


@pytest.mark.parametrize("page", ["first-answer", "answers"])
async def test_the_programs_of_a_page(page: str, stack: Stack) -> None:
    printed = io.StringIO()
    for program in programs(ROOT / "docs" / f"{page}.md", "python"):
        known: dict[str, Any] = {}
        with contextlib.redirect_stdout(printed):
            await asyncio.to_thread(exec, here(program, stack), known)
        known["client"].close()
    assert "t0 t1 t2" in printed.getvalue()
