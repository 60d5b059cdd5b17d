"""docs/reference is what the code says."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_each_page_of_the_reference_is_current() -> None:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "scripts" / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    committed = {page.name: page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md")}
    assert committed == reference.pages(), "run `python scripts/reference.py`"
