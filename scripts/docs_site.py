"""Prepares the site of the docs in build/site: pages with links that hold there, and the navigation.

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
DOCS: Final = ROOT / "docs"
SITE: Final = ROOT / "build" / "site" / "docs"
PAGES: Final = {
    "README.md": "overview.md",
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "tests/benchmarks/README.md": "benchmark-scripts.md",
}
_CODE_OR_LINK: Final = re.compile(
    r"^(```|~~~).*?^\1|`[^`\n]*`|(?:(?<=\]\()|(?<=src=\")|(?<=srcset=\"))(?!#|[a-z]+:)(?P<target>[^)#\"\s]+)",
    re.MULTILINE | re.DOTALL,
)


class DeadLink(Exception):
    """A link that does not hold on the site."""


def main() -> int:
    """Fill the folder anew."""
    shutil.rmtree(SITE, ignore_errors=True)
    shutil.copytree(DOCS, SITE, ignore=shutil.ignore_patterns("*.md", "*.toml"))
    pages = {page: page.relative_to(DOCS) for page in DOCS.rglob("*.md")}
    pages |= {ROOT / page: Path(name) for page, name in PAGES.items()}
    try:
        for page, name in pages.items():
            (SITE / name).parent.mkdir(parents=True, exist_ok=True)
            (SITE / name).write_text(_linked(page, pages))
    except DeadLink as exc:
        print(exc, file=sys.stderr)
        return 1
    config = (DOCS / "zensical.toml").read_text()
    nav = f"[project]\nnav = [\n{_navigation((SITE / 'README.md').read_text())}]\n"
    (SITE.parent / "zensical.toml").write_text(config.replace("[project]\n", nav))
    return 0


def _navigation(index: str) -> str:
    """The pages of the table of all pages, by its sections, as TOML."""
    lines = ['"README.md",']
    for row in index.partition("## Pages by task")[2].splitlines():
        if section := re.match(r"\| \*\*(.+)\*\* \|", row):
            lines += [*(["]},"] if len(lines) > 1 else []), f'{{"{section[1]}" = [']
        for title, page in re.findall(r"\[([^]]+)\]\((.+?)\)", row):
            lines.append(f'{{"{title.replace("`", "")}" = "{page}"}},')
    return "\n".join([*lines, "]},\n"])


def _linked(page: Path, pages: dict[Path, Path]) -> str:
    """The text of a page, with the links that it has on the site."""

    def link(found: re.Match[str]) -> str:
        if not found["target"]:
            return found[0]
        target = Path(os.path.normpath(page.parent / found["target"]))
        if target in pages:
            name = pages[target]
        elif target.is_relative_to(DOCS):
            name = target.relative_to(DOCS)
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
