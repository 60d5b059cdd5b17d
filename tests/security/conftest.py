"""Servers with deploy/nats/forebay.conf."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.secured import Site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A server for the tests that change nothing of it."""
    site = Site(tmp_path_factory.mktemp("site"))
    site.server.start()
    try:
        yield site
    finally:
        site.server.stop()


@pytest.fixture
def own_site(tmp_path: Path) -> Iterator[Site]:
    """A server for one test alone."""
    site = Site(tmp_path / "site")
    site.server.start()
    try:
        yield site
    finally:
        site.server.stop()
