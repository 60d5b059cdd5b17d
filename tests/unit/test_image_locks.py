"""The lock files of the images: each image is built with its own and with build.lock."""

import re
from pathlib import Path

import pytest

CONSTRAINTS = Path(__file__).parents[2] / "constraints"


def versions(lock: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==(\S+)", (CONSTRAINTS / lock).read_text(), re.MULTILINE))


@pytest.mark.parametrize("lock", ["api.lock", "inference-cpu.lock", "inference-cuda.lock", "inference-served.lock"])
def test_a_package_has_one_version_in_an_image(lock: str) -> None:
    found, build = versions(lock), versions("build.lock")
    assert {name: found.get(name, version) for name, version in build.items()} == build


def test_a_worker_beside_a_server_has_no_torch() -> None:
    found = versions("inference-served.lock")
    assert {"aiohttp", "transformers", "llguidance"} <= found.keys()
    assert "torch" not in found
