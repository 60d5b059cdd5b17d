import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def check_links() -> ModuleType:
    path = Path(__file__).parents[2] / "scripts" / "check_links.py"
    spec = importlib.util.spec_from_file_location("check_links", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_dead_files_and_headings_are_found(check_links: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# A `code` heading, twice\n\n# A code heading, twice\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[good](other.md) [good](other.md#a-code-heading-twice-1) [far](https://example.org/x) [here](#top)\n"
        "[bad](missing.md) [bad](other.md#nowhere) `[code](nothing.md)`\n"
        "```\n[fenced](nothing.md)\n```\n# Top\n"
    )
    assert list(check_links.dead_links(page)) == [
        f"{page}: missing.md: there is no such file",
        f"{page}: other.md#nowhere: there is no such heading",
    ]
