"""The README where the repository is not: its links made absolute."""

import re

_TARGET = re.compile(r"(\]\(|(?:src|srcset)=\")(?![a-z]+:|#)([^)\"\s]+)")
"""A link of Markdown, or an image of HTML, that is relative."""


def absolute(readme: str, url: str, tag: str) -> str:
    """`readme` with its relative links and images at `tag` of the repository at `url`."""

    def led(found: re.Match[str]) -> str:
        before, path = found.groups()
        kind = "raw" if path.endswith((".png", ".svg")) else "blob"
        return f"{before}{url}/{kind}/{tag}/{path}"

    return _TARGET.sub(led, readme)
