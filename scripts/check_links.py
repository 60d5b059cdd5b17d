"""Finds dead relative links and anchors in the Markdown files; exit code 1 if there is one."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

_FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`[^`\n]*`")
_LINK = re.compile(r"\]\(\s*<?([^)\s>]+)>?[^)]*\)")
_HEADING = re.compile(r"^#{1,6}\s+(.+?)\s*#*$", re.MULTILINE)


def main() -> int:
    """Check every Markdown file that git knows."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.md"],
        check=True,
        capture_output=True,
        text=True,
    )
    # One that is deleted is listed until that is committed.
    pages = [page for name in listed.stdout.split("\0") if name and (page := Path(name)).exists()]
    faults = [fault for page in pages for fault in dead_links(page)]
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


def dead_links(page: Path) -> Iterator[str]:
    """A sentence for each relative link of `page` that leads nowhere."""
    for target in _LINK.findall(_CODE.sub("", _FENCE.sub("", page.read_text()))):
        if re.match(r"[a-z][a-z0-9+.-]*:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        if not linked.exists():
            yield f"{page}: {target}: there is no such file"
        elif anchor and linked.suffix == ".md" and anchor not in anchors(linked):
            yield f"{page}: {target}: there is no such heading"


def anchors(page: Path) -> set[str]:
    """The anchors of the headings of `page`, made as GitHub makes them."""
    seen: dict[str, int] = {}
    found = set()
    for heading in _HEADING.findall(_FENCE.sub("", page.read_text())):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        slug = re.sub(r"[^\w\- ]", "", text.lower()).strip().replace(" ", "-")
        count = seen.get(slug, 0)
        seen[slug] = count + 1
        found.add(f"{slug}-{count}" if count else slug)
    return found


if __name__ == "__main__":
    sys.exit(main())
