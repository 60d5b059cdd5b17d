"""The `forebay up` that runs on a DATA_DIR: its lock, and where its owner's commands find its api and NATS."""

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from forebay_contracts.settings import Settings
from forebay_contracts.wire.errors import ConfigurationError

_LOCK: Final = "up.lock"
_RECORD: Final = "up.json"


class Running(BaseModel):
    """Where a running `forebay up` is: the URL of its api, and the settings with which a client connects to its NATS.

    It is a file in DATA_DIR that only its owner can read.
    """

    model_config = ConfigDict(frozen=True)

    api_url: str
    nats_url: str
    nats_nkey_seed: Path | None
    nats_credentials: Path | None
    nats_tls_ca: Path | None
    nats_tls_cert: Path | None
    nats_tls_key: Path | None

    @classmethod
    def of(cls, api_url: str, settings: Settings) -> Self:
        """The record of an api at `api_url`, and of a NATS that `settings` lead to."""
        access = {name: getattr(settings, name) for name in ACCESS}
        # Commands run in other folders.
        absolute = {name: value.absolute() for name, value in access.items() if isinstance(value, Path)}
        return cls(api_url=api_url, **access | absolute)

    @property
    def access(self) -> dict[str, Any]:
        """The settings with which a client connects to its NATS."""
        return {name: getattr(self, name) for name in ACCESS}

    def write(self, data_dir: Path) -> None:
        """Tell the commands on this DATA_DIR. The lock must be held."""
        write(data_dir / _RECORD, self.model_dump_json() + "\n")


ACCESS: Final = tuple(name for name in Running.model_fields if name.startswith("nats_"))
"""The settings that say how a client connects to NATS."""


def write(path: Path, text: str) -> None:
    """Write a file that only its owner can read. A process that is killed meanwhile leaves the old one."""
    descriptor, made = tempfile.mkstemp(dir=path.parent)  # mode 0600
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(made, path)
    except OSError as exc:
        os.unlink(made)
        raise OSError(exc.errno, exc.strerror, str(path)) from exc


@contextlib.contextmanager
def exclusive(data_dir: Path) -> Iterator[None]:
    """Lock DATA_DIR for this process, and forget what an earlier one has told there.

    The kernel releases the lock however the process ends.

    Raises:
        ConfigurationError: another `forebay up` holds it, or it cannot be written.
    """
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        lock = (data_dir / _LOCK).open("ab+", buffering=0)
    except OSError as exc:
        raise ConfigurationError(f"DATA_DIR={data_dir} cannot be used: {exc.strerror}") from exc
    with lock:
        if not _try_lock(lock.fileno()):
            lock.seek(0)
            raise ConfigurationError(
                f"`forebay up` already runs on DATA_DIR={data_dir} (process {lock.read().decode() or 'unknown'}): "
                f"stop it, or give this one another --data-dir"
            )
        try:
            lock.truncate(0)
            lock.write(str(os.getpid()).encode())
            (data_dir / _RECORD).unlink(missing_ok=True)
            (data_dir / "nats" / "url").unlink(missing_ok=True)
        except OSError as exc:
            raise ConfigurationError(f"DATA_DIR={data_dir} cannot be used: {exc.strerror}") from exc
        yield


def running(data_dir: Path) -> Running | None:
    """The `forebay up` that runs on DATA_DIR; None if none does, or it has no server yet.

    Raises:
        ConfigurationError: it runs, and belongs to another user.
    """
    folder = data_dir.absolute()
    try:
        with (folder / _LOCK).open() as lock:
            # Shared: two commands that look at the same moment do not take each other for a `forebay up`.
            if _try_lock(lock.fileno(), fcntl.LOCK_SH):
                return None
        return Running.model_validate_json((folder / _RECORD).read_text())
    except PermissionError as exc:
        raise ConfigurationError(
            f"the `forebay up` of DATA_DIR={data_dir} belongs to another user: run this as that user, or set NATS_URL"
        ) from exc
    except (OSError, ValidationError):
        return None


def _try_lock(descriptor: int, kind: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
