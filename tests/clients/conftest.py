"""Clients as their users install them: npm's go to build/clients/node, openai-agents to a venv of its own."""

import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from support.nats import NatsServer
from support.stack import Stack, running

HERE = Path(__file__).parent
INSTALLED = HERE.parents[1] / "build" / "clients"
AGENTS = "openai-agents==0.24.0"


@pytest.fixture
async def stack(nats_server: NatsServer) -> AsyncIterator[Stack]:
    async with running(nats_server, workers=1, max_concurrent_requests=4) as made:
        yield made


@pytest.fixture(scope="session")
def node() -> Path:
    """The folder of the Node clients: their packages and our scripts."""
    folder = INSTALLED / "node"
    folder.mkdir(parents=True, exist_ok=True)
    for file in (HERE / "node").glob("*.js"):
        shutil.copy(file, folder)
    wanted = (HERE / "node" / "package.json").read_text()
    installed = folder / ".installed"
    if not installed.is_file() or installed.read_text() != wanted:
        (folder / "package.json").write_text(wanted)
        _run("npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--no-package-lock", cwd=folder)
        # What its own script would do: put the program of this platform into its place.
        _run("node", "node_modules/@anthropic-ai/claude-code/install.cjs", cwd=folder)
        installed.write_text(wanted)
    return folder


@pytest.fixture(scope="session")
def agents() -> Path:
    """The Python that has openai-agents."""
    venv = INSTALLED / AGENTS
    python = venv / "bin" / "python"
    if not (venv / ".installed").is_file():
        _run(sys.executable, "-m", "venv", str(venv), cwd=HERE)
        _run(str(python), "-m", "pip", "install", "-q", AGENTS, cwd=HERE)
        (venv / ".installed").touch()
    return python


def _run(*command: str, cwd: Path) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
