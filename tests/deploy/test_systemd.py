"""The units of deploy/systemd: systemd accepts them, they are confined, and their settings load."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from forebay_contracts.settings import ApiSettings, InferenceSettings, load
from support.manifests import DEPLOY

pytestmark = pytest.mark.deploy

UNITS = sorted((DEPLOY.parent / "systemd").glob("*.service"))
ETC = {f"/etc/forebay/{file.name}": file for file in (DEPLOY.parent / "systemd").glob("*.env")}


def directives(unit: Path, name: str) -> list[str]:
    return [line.partition("=")[2] for line in unit.read_text().splitlines() if line.startswith(f"{name}=")]


def environment(unit: Path, instance: str) -> dict[str, str]:
    """What the service gets: files win over `Environment`, and later ones over earlier ones."""
    lines = [word for line in directives(unit, "Environment") for word in line.replace("%i", instance).split()]
    for name in directives(unit, "EnvironmentFile"):
        file = ETC.get(name.removeprefix("-"))
        assert file or name.startswith("-"), f"{name} must be there"
        lines += file.read_text().splitlines() if file else []
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_accepts_the_unit_and_finds_it_confined(unit: Path, tmp_path: Path) -> None:
    copy = tmp_path / unit.name
    copy.write_text(unit.read_text().replace("/opt/forebay/bin/", f"{Path(sys.executable).parent}/"))
    analyze = shutil.which("systemd-analyze")
    assert analyze, "systemd-analyze is missing"
    checked = subprocess.run([analyze, "verify", "--man=no", copy], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")
    # In tenths. 40 is "OK"; the workers need the devices of the GPU.
    most = 40 if "inference" in unit.name else 20
    secure = [analyze, "security", "--offline=true", f"--threshold={most}", copy]
    assert subprocess.run(secure, capture_output=True, check=False).returncode == 0


def test_a_worker_reaches_its_gpu_and_each_unit_is_started_again_for_ever() -> None:
    _, inference, _ = UNITS
    # Each of them implies a DeviceAllow, and then all other devices are denied.
    assert not directives(inference, "PrivateDevices") + directives(inference, "ProtectClock")
    for unit in UNITS:
        before, _, _ = unit.read_text().partition("[Service]")
        assert "StartLimitIntervalSec=0" in before  # systemd ignores it in [Service]


def test_settings_load_and_a_stop_waits_for_a_drain(monkeypatch: pytest.MonkeyPatch) -> None:
    api, inference, nats = UNITS
    assert directives(nats, "Restart") == ["always"]
    for unit, instance, cls in ((api, "8092", ApiSettings), (inference, "1", InferenceSettings)):
        with monkeypatch.context() as patch:
            given = environment(unit, instance)
            for name, value in given.items():
                patch.setenv(name, value)
            loaded = load(cls, _env_file=None)
        known = {name.upper() for name in cls.model_fields} | {"CUDA_VISIBLE_DEVICES", "HOME"}
        assert given.keys() <= known
        (timeout_s,) = directives(unit, "TimeoutStopSec")
        delay_s = loaded.shutdown_delay if isinstance(loaded, ApiSettings) else 0
        assert int(timeout_s) > loaded.drain_timeout + delay_s
        assert directives(unit, "Restart") == ["on-failure"]  # a drained worker stays down
    assert environment(api, "8092")["API_PORT"] == "8092"
    assert environment(inference, "1")["CUDA_VISIBLE_DEVICES"] == "1"
