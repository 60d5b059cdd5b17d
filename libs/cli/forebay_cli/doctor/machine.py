"""The disk and the model on this machine."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from forebay_cli.doctor.findings import Finding, Severity, size
from forebay_contracts.settings import Settings

LOW_DISK_BYTES = 5 * 2**30
TOO_LOW_DISK_BYTES = 2**30

MANIFEST = "SHA256SUMS"
"""The checksums of a converted model's files, in its folder, in the format of `sha256sum`."""


def findings(read: Settings) -> list[Finding]:
    """Run the checks."""
    data_dir = read.data_dir
    return [*disk(data_dir), *_model_cache(read.default_model, data_dir)]


def disk(data_dir: Path) -> Iterator[Finding]:
    """Whether DATA_DIR can be written, and how much room its disk has."""
    there = next(folder for folder in (data_dir, *data_dir.absolute().parents) if folder.exists())
    if not os.access(there, os.W_OK):
        yield Finding("disk", "problem", f"{there} cannot be written", "set DATA_DIR to a folder that can")
        return
    free = shutil.disk_usage(there).free
    severity: Severity = "problem" if free < TOO_LOW_DISK_BYTES else "warning" if free < LOW_DISK_BYTES else "ok"
    fix = "" if severity == "ok" else "free some space, or set DATA_DIR to a larger disk"
    yield Finding("disk", severity, f"{size(free)} free for DATA_DIR={data_dir}", fix)


def _model_cache(model: str, data_dir: Path) -> Iterator[Finding]:
    path = Path(os.path.expanduser(model))
    if path.is_dir() or path.suffix == ".gguf" or model.startswith(("/", "./", "../", "~")):
        there = (path / "config.json").is_file() if path.is_dir() else path.is_file()
        fix = "" if there else "set DEFAULT_MODEL to a folder with a config.json, a GGUF file, or a hub id"
        yield Finding("model", "ok" if there else "problem", f"{path} is {'' if there else 'not '}there", fix)
        return
    slug = model.replace("/", "--")
    folders = [folder for folder in (data_dir / "models").glob(f"{slug}-v*") if (folder / "config.json").is_file()]
    for folder in folders:
        yield from _checked(folder)
    if not folders:
        if (data_dir / "hub" / f"models--{slug}").is_dir():
            yield Finding("model", "ok", f"{model} is in the hub's cache, which keeps checksums of its own")
        else:
            # The default model comes as a package, and a worker on another machine has its own cache.
            yield Finding("model", "ok", f"{model} is not on this machine: its first worker here fetches it")
    partial = list((data_dir / "models").glob(f".{slug}*.partial-*"))
    if partial:
        fix = "none if a worker is starting now; else the next start removes it"
        yield Finding("model", "warning", f"{partial[0]} is incomplete", fix)


def _checked(folder: Path) -> Iterator[Finding]:
    manifest = folder / MANIFEST
    if not manifest.is_file():
        yield Finding("model", "ok", f"{folder} is complete; it is older than the checksums")
        return
    fix = f"remove the folder: `rm -r {folder}`; the next start makes it again"
    lines = (line.partition("  ") for line in manifest.read_text().splitlines())
    wrong = [name for digest, _, name in lines if _digest(folder / name) != digest]
    if wrong:
        yield Finding("model", "problem", f"{folder}: {', '.join(wrong)} is not what was written", fix)
    else:
        yield Finding("model", "ok", f"{folder} is complete, its checksums are right")


def _digest(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None
