"""The images: what is in them, what they may do, how soon they serve and how they end."""

import os
import statistics
import time
from collections.abc import Iterator

import httpx
import pytest

from support.containers import NATS_IMAGE, UNPRIVILEGED, becomes_healthy, docker, inspect, log, logged

pytestmark = [pytest.mark.containers, pytest.mark.timeout(180)]

API = "forebay-api:latest"
INFERENCE = "forebay-inference:cpu"
SERVED = "forebay-inference:served"
BASE = "python:3.11-slim-bookworm"
MB = 1_000_000
MOST_OVER_BASE_BYTES = 200 * MB
READY_WITHIN_S = 3.0
READY_POLL_S = 0.01

FOUND = """
import importlib.util, shutil
modules = [name for name in ("torch", "transformers", "pip", "setuptools") if importlib.util.find_spec(name)]
print(*modules, *filter(shutil.which, ("pip", "pip3", "gcc", "cc", "make", "git")))
"""


@pytest.fixture(scope="module")
def network() -> Iterator[str]:
    """A network with a NATS server of the name `nats`."""
    name = f"forebay-test-images-{os.getpid()}"
    docker("network", "create", name)
    nats = docker("run", "--detach", "--network", name, "--network-alias", "nats", *UNPRIVILEGED, NATS_IMAGE,
                  "nats-server", "--jetstream", "--store_dir", "/tmp/store")  # fmt: skip
    try:
        logged(nats, "Server is ready")
        yield name
    finally:
        docker("rm", "--force", "--volumes", nats)
        docker("network", "rm", name)


def created(image: str, network: str, *options: str) -> Iterator[str]:
    """A container that may do nothing, not started yet; gone afterwards."""
    container = docker(
        "create", "--network", network, *UNPRIVILEGED, "--env", "NATS_URL=nats://nats:4222", *options, image
    )
    try:
        yield container
    finally:
        docker("rm", "--force", "--volumes", container)


@pytest.fixture
def api(network: str) -> Iterator[str]:
    yield from created(API, network, "--publish", "127.0.0.1::8091")


@pytest.fixture(params=[INFERENCE, SERVED])
def worker(request: pytest.FixtureRequest, network: str) -> Iterator[str]:
    yield from created(request.param, network, "--env", "INFERENCE_ENGINE=simulated")


def assert_ends_well(container: str, module: str) -> None:
    """Our process is the first, gets the signal itself, and ends before it would be killed."""
    assert docker("exec", container, "cat", "/proc/1/cmdline").split("\0")[1:3] == ["-m", module]
    docker("stop", "--time", "20", container)
    assert inspect(container)["State"]["ExitCode"] == 0


def test_the_api_image_holds_what_runs_and_no_more(capsys: pytest.CaptureFixture[str]) -> None:
    assert docker("run", "--rm", "--network", "none", "--entrypoint", "python", API, "-c", FOUND) == ""
    size, base = (inspect(image)["Size"] for image in (API, BASE))
    with capsys.disabled():
        print(f"\n{API}: {size / MB:.0f} MB, {(size - base) / MB:.0f} MB over its base")
    assert 0 < size - base < MOST_OVER_BASE_BYTES


@pytest.mark.parametrize(
    ("image", "holds"),
    # torch itself needs setuptools.
    [(INFERENCE, {"torch", "transformers", "setuptools"}), (SERVED, {"transformers"})],
)
def test_an_inference_image_holds_no_build_tools(
    image: str, holds: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    found = docker("run", "--rm", "--network", "none", "--entrypoint", "python", image, "-c", FOUND)
    assert set(found.split()) <= holds, found
    with capsys.disabled():
        print(f"\n{image}: {inspect(image)['Size'] / MB:.0f} MB")


def seconds_until_ready(api: str) -> float:
    """From `docker start` until its port answers that it is ready."""
    started = time.monotonic()
    docker("start", api)
    url = f"http://{docker('port', api, '8091')}/health/ready"
    with httpx.Client() as client:
        while time.monotonic() < started + 10 * READY_WITHIN_S:
            try:
                if client.get(url).status_code == httpx.codes.OK:
                    return time.monotonic() - started
            except httpx.TransportError:  # the engine's own proxy listens before the api does
                pass
            time.sleep(READY_POLL_S)
    pytest.fail(f"{url} never answered 200:\n{log(api)}")


def test_the_api_is_ready_soon(api: str, capsys: pytest.CaptureFixture[str]) -> None:
    took = []
    for _ in range(3):
        took.append(seconds_until_ready(api))
        docker("stop", api)
    with capsys.disabled():
        print(f"\n{API}: ready {', '.join(f'{seconds:.2f}' for seconds in took)} s after docker start")
    # The first start after a build may wait for the disk, which is the machine's business.
    assert statistics.median(took) < READY_WITHIN_S


def test_the_api_is_healthy_unprivileged_and_ends_well(api: str) -> None:
    docker("start", api)
    becomes_healthy(api)
    assert docker("exec", api, "id", "--user") == "10001"
    assert_ends_well(api, "forebay_api")


def test_a_worker_is_healthy_unprivileged_and_ends_well(worker: str) -> None:
    docker("start", worker)
    becomes_healthy(worker)
    assert docker("exec", worker, "id", "--user") == "10001"
    docker("exec", worker, "python", "-m", "forebay_contracts.probe", "9091", "/health/ready")
    assert_ends_well(worker, "forebay_inference")
