from collections.abc import Iterator
from pathlib import Path

import pytest

from support.nats import NatsServer


@pytest.fixture(autouse=True)
def _clean_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting of the machine reaches a test: neither the environment's nor a `.env` in the working folder.

    DATA_DIR alone does, so that a model that was fetched once is found again.
    """
    from forebay_contracts.settings import ApiSettings, InferenceSettings

    for name in (ApiSettings.model_fields | InferenceSettings.model_fields).keys() - {"data_dir"}:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def nats_server(tmp_path: Path) -> Iterator[NatsServer]:
    """A real nats-server, on a free port and with an empty store."""
    server = NatsServer(tmp_path / "nats")
    server.start()
    try:
        yield server
    finally:
        server.stop()


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
