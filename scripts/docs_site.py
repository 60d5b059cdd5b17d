"""Copies what the site of the docs shows into build/site/docs, with links that hold there. `make docs` builds it.

A page of the repository outside of docs gets a name there (`PAGES`). A source file that a page links to is copied as
text. Exit code 1, with a sentence, if a link leads to something else.
"""

import os
import re
import shutil
import sys
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
SITE: Final = ROOT / "build" / "site" / "docs"
PAGES: Final = {
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "tests/benchmarks/README.md": "benchmark-scripts.md",
}
_CODE_OR_LINK: Final = re.compile(
    r"^(```|~~~).*?^\1|`[^`\n]*`|(?<=\]\()(?!#|[a-z]+:)(?P<target>[^)#\s]+)", re.MULTILINE | re.DOTALL
)


class DeadLink(Exception):
    """A link that does not hold on the site."""


def main() -> int:
    """Fill the folder anew."""
    shutil.rmtree(SITE, ignore_errors=True)
    shutil.copytree(ROOT / "docs", SITE, ignore=shutil.ignore_patterns("*.md"))
    pages = {page: page.relative_to(ROOT / "docs") for page in (ROOT / "docs").rglob("*.md")}
    pages |= {ROOT / page: Path(name) for page, name in PAGES.items()}
    try:
        for page, name in pages.items():
            (SITE / name).parent.mkdir(parents=True, exist_ok=True)
            (SITE / name).write_text(_linked(page, pages))
    except DeadLink as exc:
        print(exc, file=sys.stderr)
        return 1
    return 0


def _linked(page: Path, pages: dict[Path, Path]) -> str:
    """The text of a page, with the links that it has on the site."""

    def link(found: re.Match[str]) -> str:
        if not found["target"]:
            return found[0]
        target = Path(os.path.normpath(page.parent / found["target"]))
        if target in pages:
            name = pages[target]
        elif target.is_relative_to(ROOT / "docs"):
            name = target.relative_to(ROOT / "docs")
        elif target.is_file() and target.suffix != ".md":
            name = Path("source", f"{target.relative_to(ROOT)}.txt")
            (SITE / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(target, SITE / name)
        else:
            raise DeadLink(f"{page.relative_to(ROOT)}: {found['target']} is no page of the site: link to one of docs")
        return os.path.relpath(name, pages[page].parent)

    return _CODE_OR_LINK.sub(link, page.read_text())


if __name__ == "__main__":
    sys.exit(main())
