import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import hypothesis
import pytest

from support.nats import NatsServer
from support.nats_container import why_no_container
from support.service import ForkServer, Service

# A busy machine may take longer for an example. pytest's own limit ends a test that hangs.
hypothesis.settings.register_profile("forebay", deadline=None)
hypothesis.settings.load_profile("forebay")

# A shell starts what runs in the background with SIGINT ignored, which the processes of the tests would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

StartNats = Callable[[Path], AbstractContextManager[NatsServer]]


@pytest.fixture(autouse=True)
def _clean_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting of the machine reaches a test: neither the environment's nor a `.env` in the working folder.

    DATA_DIR alone does, so that a model that was fetched once is found again.
    """
    from forebay_contracts.settings import ApiSettings, InferenceSettings

    for name in (ApiSettings.model_fields | InferenceSettings.model_fields).keys() - {"data_dir"}:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.chdir(tmp_path)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--nats",
        choices=("container", "embedded"),
        help="where the NATS of tests/integration runs (default: in a container where an engine has its image)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Choose once: the processes of xdist get the options as they are then."""
    if config.getoption("nats") is None:
        config.option.nats_reason = why_no_container()
        config.option.nats = "embedded" if config.option.nats_reason else "container"


def pytest_report_header(config: pytest.Config) -> str:
    reason = getattr(config.option, "nats_reason", None)
    return f"nats of tests/integration: {config.option.nats}" + (f", since {reason}" if reason else "")


@pytest.fixture(scope="session", autouse=True)
def _fork_server() -> Iterator[None]:
    """Services start by fork where that is safe beside the threads of system libraries: on Linux."""
    if sys.platform != "linux":
        yield
        return
    server = ForkServer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Service, "starter", staticmethod(server.forked))
        yield
    server.stop()


@contextmanager
def embedded_nats(store: Path) -> Iterator[NatsServer]:
    server = NatsServer(store)
    server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def start_nats() -> StartNats:
    """How the fixtures below start a server; tests/integration has another way."""
    return embedded_nats


@pytest.fixture
def nats_server(start_nats: StartNats, tmp_path: Path) -> Iterator[NatsServer]:
    """A real nats-server, on a free port and with an empty store."""
    with start_nats(tmp_path / "nats") as server:
        yield server


@pytest.fixture(scope="module")
def module_nats(start_nats: StartNats, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """A real nats-server for all tests of a module, which must not disturb each other."""
    folder = tmp_path_factory.mktemp("module")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # no `.env` of the working folder reaches what is started here
        with start_nats(folder / "nats") as server:
            yield server
