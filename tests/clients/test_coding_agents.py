"""Codex and Claude Code without a terminal: each runs a command that the model asks for, and outlives a long wait."""

import json
from pathlib import Path
from typing import Any

import pytest

from support.nats import NatsServer
from support.program import output_of
from support.stack import MODEL, Stack, running

pytestmark = [pytest.mark.clients, pytest.mark.timeout(300)]

CONFIG = """
model = "{model}"
model_provider = "forebay"

[model_providers.forebay]
name = "Forebay"
base_url = "{url}/v1"
wire_api = "responses"
env_key = "FOREBAY_API_KEY"
"""
PATCH = "*** Begin Patch\n*** Add File: hello.txt\n+Hello.\n*** End Patch\n"


def calling(tool: str, **arguments: str) -> str:
    """What makes the simulated engine call a tool."""
    call = json.dumps({"name": tool, "arguments": arguments})
    return f"[[say]]Let me see.\n<tool_call>\n{call}\n</tool_call>"


class Codex:
    """`codex exec` in a folder of its own."""

    def __init__(self, node: Path, home: Path, url: str, more: str = "") -> None:
        self._program = node / "node_modules" / ".bin" / "codex"
        self._home = home
        (home / "config.toml").write_text(CONFIG.format(model=MODEL, url=url) + more)

    async def run(self, *arguments: str) -> str:
        """What Codex wrote."""
        env = {"CODEX_HOME": str(self._home), "FOREBAY_API_KEY": "key"}
        return await output_of(self._program, *arguments, cwd=self._home, **env)

    async def asked(self, prompt: str, *options: str) -> list[dict[str, Any]]:
        """The items of its answer."""
        told = await self.run("exec", "--json", "--skip-git-repo-check", *options, prompt)
        events = [json.loads(line) for line in told.splitlines()]
        assert events[-1]["type"] == "turn.completed", events
        return [event["item"] for event in events if event["type"] == "item.completed"]


async def test_codex_runs_a_command(stack: Stack, node: Path, tmp_path: Path) -> None:
    codex = Codex(node, tmp_path, stack.apis[0].url)
    before, ran, after = (await codex.asked(calling("exec_command", cmd="echo '[[say]]All done.'")))[-3:]
    assert (before["text"], after["text"]) == ("Let me see.", "All done.\n")
    assert (ran["type"], ran["exit_code"], ran["aggregated_output"]) == ("command_execution", 0, "[[say]]All done.\n")


async def test_codex_applies_a_patch(stack: Stack, node: Path, tmp_path: Path) -> None:
    codex = Codex(node, tmp_path, stack.apis[0].url)
    # It offers this custom tool to models that its catalog says can use it.
    catalog = json.loads(await codex.run("debug", "models"))["models"]
    model = next(one for one in catalog if one["apply_patch_tool_type"] == "freeform" and "tool_mode" not in one)
    (tmp_path / "models.json").write_text(json.dumps({"models": [model | {"slug": MODEL}]}))
    items = await codex.asked(
        calling("apply_patch", input=PATCH),
        "--dangerously-bypass-approvals-and-sandbox",
        "--config",
        f'model_catalog_json="{tmp_path / "models.json"}"',
    )
    assert [(item["type"], item["status"]) for item in items if item["type"] == "file_change"] == [
        ("file_change", "completed")
    ]
    assert (tmp_path / "hello.txt").read_text() == "Hello.\n"


async def test_codex_waits_longer_than_it_waits_for_an_event(
    nats_server: NatsServer, node: Path, tmp_path: Path
) -> None:
    impatient = "stream_idle_timeout_ms = 1000\nstream_max_retries = 0\n"
    async with running(nats_server, workers=1, max_concurrent_requests=1, stream_keep_alive=0.2) as stack:
        codex = Codex(node, tmp_path, stack.apis[0].url, impatient)
        items = await codex.asked("[[tokens=2 delay_ms=2500]]")
    assert items[-1]["text"] == "t0 t1"


async def test_claude_code_runs_a_command(stack: Stack, node: Path, tmp_path: Path) -> None:
    out = await output_of(
        node / "node_modules" / ".bin" / "claude",
        "-p",
        calling("Bash", command="echo '[[say]]All done.'", description="Say it"),
        "--allowedTools",
        "Bash",
        "--output-format",
        "stream-json",
        "--verbose",
        cwd=tmp_path,
        ANTHROPIC_BASE_URL=stack.apis[0].url,
        ANTHROPIC_API_KEY="key",
        ANTHROPIC_MODEL=MODEL,
    )
    events = [json.loads(line) for line in out.splitlines()]
    results = [block["content"] for event in events if event["type"] == "user" for block in event["message"]["content"]]
    assert results == ["[[say]]All done."]
    assert (events[-1]["type"], events[-1]["is_error"], events[-1]["result"]) == ("result", False, "All done.")
