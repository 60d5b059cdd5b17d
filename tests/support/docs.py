"""The commands and programs that the docs show."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?:^ {4}.*\n)+", re.MULTILINE)
_SHELL = re.compile(r"(?:[A-Z_]+=\S* )*(?:forebay|curl|nats|export|[A-Z]+=)")


def programs(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return [text for found, text in _FENCE.findall(page.read_text()) if found == language]


def commands(page: Path) -> list[str]:
    """Each command of the shell, one after another: of fenced blocks, and of indented ones that are the shell's."""
    text = page.read_text()
    blocks = [(found.start(), found[2]) for found in _FENCE.finditer(text) if found[1] in ("bash", "sh")]
    outside = _FENCE.sub(lambda found: " " * len(found[0]), text)
    for found in _INDENTED.finditer(outside):
        lines = re.sub(r"^ {4}", "", found[0], flags=re.MULTILINE)
        if _SHELL.match(lines):
            blocks.append((found.start(), lines))
    return [command for _, block in sorted(blocks) for command in _split(block)]


def inline(page: Path) -> list[str]:
    """What stands as code in a line and begins with `forebay`."""
    return re.findall(r"`((?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?forebay [^`\n]*)`", _FENCE.sub("", page.read_text()))


def words(command: str) -> list[str]:
    """The words of its first simple command, without comments and redirections."""
    found = shlex.split(command, comments=True)
    ends = [at for at, word in enumerate(found) if word in ("|", "&&", ";", ">", ">>")]
    return found[: min(ends, default=len(found))]


def _split(block: str) -> list[str]:
    """Lines, but those that go on: after a backslash, or in quotes."""
    found, begun = [], ""
    for line in block.splitlines():
        begun += line
        if line.endswith("\\") or not _whole(begun):
            begun += "\n"
        else:
            found += [begun] if begun.strip() and not begun.startswith("#") else []
            begun = ""
    assert not begun, f"a command without its end: {begun}"
    return found


def _whole(command: str) -> bool:
    try:
        shlex.split(command, comments=True)
    except ValueError:
        return False
    return True
