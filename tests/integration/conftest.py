from collections.abc import Iterator

import pytest

from support.nats import NatsServer


@pytest.fixture(scope="module")
def module_nats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """A real nats-server for all tests of a module, which must not disturb each other."""
    folder = tmp_path_factory.mktemp("module")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # no `.env` of the working folder reaches what is started here
        server = NatsServer(folder / "nats")
        server.start()
        try:
            yield server
        finally:
            server.stop()
