import pytest

from support.manifests import OVERLAYS, Manifests, rendered


@pytest.fixture(params=OVERLAYS)
def manifests(request: pytest.FixtureRequest) -> Manifests:
    """Each overlay in turn."""
    return rendered(request.param)


@pytest.fixture
def production() -> Manifests:
    """The overlay of that name."""
    return rendered("production")
