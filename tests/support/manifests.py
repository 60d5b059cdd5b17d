"""The Kubernetes manifests as `kubectl kustomize` renders them, or Helm."""

import functools
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest
import yaml

from forebay_contracts.settings import Settings, load

DEPLOY = Path(__file__).parents[2] / "deploy" / "kubernetes"
OVERLAYS = ("single-node", "production")
CONFIG_MAPS = ("queue-config", "api-config", "inference-config", "nats-config", "nats-forebay")

Object = dict[str, Any]
AnySettings = TypeVar("AnySettings", bound=Settings)


def kubectl() -> str:
    """The kubectl beside this interpreter."""
    found = shutil.which("kubectl", path=str(Path(sys.executable).parent))
    assert found, "kubectl is missing: install forebay[dev]"
    return found


class Workload(NamedTuple):
    """Something that makes pods: their labels and what they are."""

    kind: str
    name: str
    labels: dict[str, str]
    pod: Object

    @property
    def container(self) -> Object:
        """Its one container."""
        (only,) = self.pod["containers"]
        found: Object = only
        return found

    @property
    def ports(self) -> dict[str, int]:
        """Its ports by name."""
        return {port["name"]: port["containerPort"] for port in self.container.get("ports", ())}


class Manifests:
    """What an overlay, or a chart, renders to."""

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        self.text = text
        self.objects: list[Object] = [found for found in yaml.safe_load_all(text) if found]

    def of(self, *kinds: str) -> list[Object]:
        """All objects of some kinds."""
        return [found for found in self.objects if found["kind"] in kinds]

    def one(self, kind: str, name: str) -> Object:
        """The object of that name."""
        (found,) = (found for found in self.of(kind) if found["metadata"]["name"] == name)
        return found

    def workloads(self) -> list[Workload]:
        """All that makes pods."""
        return [
            Workload(
                found["kind"],
                found["metadata"]["name"],
                found["spec"]["template"]["metadata"]["labels"],
                found["spec"]["template"]["spec"],
            )
            for found in self.of("Deployment", "StatefulSet", "Job")
        ]

    def workload(self, name: str) -> Workload:
        """The one of that name."""
        (found,) = (found for found in self.workloads() if found.name == name)
        return found

    def selected(self, selector: Object) -> list[Workload]:
        """The workloads whose pods a selector matches: `matchLabels` alone is known here."""
        assert not selector.keys() - {"matchLabels"}, selector
        wanted = selector.get("matchLabels", {}).items()
        return [found for found in self.workloads() if wanted <= found.labels.items()]

    def config(self, name: str) -> dict[str, str]:
        """The data of a ConfigMap."""
        data: dict[str, str] = self.one("ConfigMap", name)["data"]
        return data

    def environment(self, name: str) -> dict[str, str]:
        """What the container of a workload gets from ConfigMaps, later ones over earlier ones, and plain values."""
        return self.environment_of(self.workload(name).container)

    def environment_of(self, container: Object) -> dict[str, str]:
        """The same of one container."""
        found: dict[str, str] = {}
        for source in container.get("envFrom", ()):
            found |= self.config(source["configMapRef"]["name"])
        return found | {one["name"]: one["value"] for one in container.get("env", ()) if "value" in one}


def kustomized(overlay: str, deploy: Path = DEPLOY) -> Manifests:
    """An overlay, with the names of ConfigMaps without their hashes."""
    done = subprocess.run(
        [kubectl(), "kustomize", str(deploy / "overlays" / overlay)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # A field that is out of date is rendered all the same, with a warning.
    assert not done.stderr, done.stderr
    return Manifests(overlay, re.sub(rf"\b({'|'.join(CONFIG_MAPS)})-[a-z0-9]{{10}}\b", r"\1", done.stdout))


@functools.cache
def rendered(overlay: str) -> Manifests:
    """An overlay, rendered once a process."""
    return kustomized(overlay)


def probes(workload: Workload) -> Iterator[tuple[str, Object]]:
    """The probes of a workload's container, each with its kind."""
    for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
        if kind in workload.container:
            yield kind, workload.container[kind]["httpGet"]


def settings(cls: type[AnySettings], environment: dict[str, str]) -> AnySettings:
    """The settings that a process with this environment loads."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        return load(cls, _env_file=None)
