import contextlib
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.nats import NatsServer
from support.nats_container import NatsContainer


@contextlib.contextmanager
def nats_in_container(_store: Path) -> Iterator[NatsContainer]:
    """Its store is the container's."""
    server = NatsContainer()
    try:
        server.start()
        yield server
    finally:
        server.remove()


@pytest.fixture(scope="session")
def start_nats(
    request: pytest.FixtureRequest, start_nats: Callable[[Path], contextlib.AbstractContextManager[NatsServer]]
) -> Callable[[Path], contextlib.AbstractContextManager[NatsServer | NatsContainer]]:
    """In a container where `--nats` says so."""
    return nats_in_container if request.config.getoption("nats") == "container" else start_nats


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what uses NATS from `start_nats`, so that `-m nats` is what `--nats` makes a difference to."""
    here = [item for item in items if item.path.is_relative_to(Path(__file__).parent)]
    for item in here:
        if "start_nats" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.nats)
        # While a container starts, its published port takes connections and drops them, which nats-py leaves unclosed.
        if config.getoption("nats") == "container":
            item.add_marker(pytest.mark.filterwarnings("ignore:.*StreamWriter:ResourceWarning"))
            item.add_marker(pytest.mark.filterwarnings("ignore:.*StreamWriter:pytest.PytestUnraisableExceptionWarning"))


@pytest.fixture(scope="module")
def usual_port_is_taken() -> Iterator[None]:
    """Embedded servers of these tests keep off 4222, where a developer's own may be, or may be looked for."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):
            holder.bind(("127.0.0.1", 4222))
            holder.listen(1)
        yield
