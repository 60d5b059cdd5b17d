"""The walks of ARCHITECTURE.md and docs/internals.md name functions that are there; that of a chat is short."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = "".join((ROOT / page).read_text() for page in ("ARCHITECTURE.md", "docs/internals.md"))
MAX_HOPS = 25

_WALK = re.compile(r"^### Walk: (.+?)\n(.*?)(?=^#|\Z)", re.MULTILINE | re.DOTALL)
_HOP = re.compile(r"^\| (\d+) \| `([\w.]+)` \| `([\w/]+\.py)` \|", re.MULTILINE)
WALKS = {title: [(int(n), name, file) for n, name, file in _HOP.findall(text)] for title, text in _WALK.findall(PAGES)}
PACKAGES = ("libs/contracts", "libs/cli", "services/api", "services/inference")


def defined(file: Path) -> set[str]:
    """The functions of a module: `name`, or `Class.name`."""
    found: set[str] = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            functions = (part for part in node.body if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef))
            found |= {f"{node.name}.{part.name}" for part in functions}
    return found


def test_there_are_walks() -> None:
    assert list(WALKS) == [
        *("a streamed chat", "cancelling", "a redelivery", "a full queue", "a stored answer"),
        "giving way",
    ]
    assert all(WALKS.values())


def test_a_streamed_chat_is_short_from_socket_to_socket() -> None:
    assert 10 < len(WALKS["a streamed chat"]) <= MAX_HOPS


@pytest.mark.parametrize("walk", list(WALKS))
def test_each_hop_is_a_function_of_the_file_that_is_named(walk: str) -> None:
    assert [number for number, _, _ in WALKS[walk]] == list(range(1, len(WALKS[walk]) + 1))
    for number, name, path in WALKS[walk]:
        files = [ROOT / package / path for package in PACKAGES if (ROOT / package / path).is_file()]
        assert files, f"{walk}, hop {number}: there is no {path}"
        assert name in defined(files[0]), f"{walk}, hop {number}: {path} has no {name}"
