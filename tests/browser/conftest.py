import shutil
from pathlib import Path

import pytest

from support.browser import Windows


@pytest.fixture
def windows(tmp_path: Path) -> Windows:
    """Windows on the page; the test is skipped where there is no Chromium."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("there is no chromium here: apt-get install chromium")
    return Windows(chromium, tmp_path)
