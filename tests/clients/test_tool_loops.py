"""Clients in the languages and frameworks that people use: each calls a tool and reads its result."""

import json
from pathlib import Path

import pytest

from support.program import output_of
from support.stack import MODEL, Stack

pytestmark = [pytest.mark.clients, pytest.mark.timeout(300)]

CALL = 'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


async def answer(stack: Stack, folder: Path, *command: str | Path) -> dict[str, object]:
    out = await output_of(*command, stack.apis[0].url, MODEL, f"[[say]]{CALL}", cwd=folder)
    told: dict[str, object] = json.loads(out.splitlines()[-1])
    return told


async def test_the_ai_sdk(stack: Stack, node: Path) -> None:
    told = await answer(stack, node, "node", "ai_sdk.js")
    assert told == {"whole": "Rain in Oslo.", "streamed": "Let me see.Rain in Oslo.", "steps": 2}


async def test_the_openai_sdk_for_node(stack: Stack, node: Path) -> None:
    words = " ".join(f"t{number}" for number in range(20))
    assert await answer(stack, node, "node", "openai_sdk.js") == {"tool": "Rain in Oslo.", "background": words}


async def test_the_anthropic_sdk_for_node(stack: Stack, node: Path) -> None:
    told = await answer(stack, node, "node", "anthropic_sdk.js")
    assert told == {"whole": "Rain in Oslo.", "streamed": "Rain in Oslo."}


async def test_openai_agents(stack: Stack, agents: Path, tmp_path: Path) -> None:
    told = await answer(stack, tmp_path, agents, Path(__file__).parent / "agents_sdk.py")
    assert told == dict.fromkeys(("whole", "streamed", "socket"), "Rain in Oslo.")
