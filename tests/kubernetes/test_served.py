"""The inference servers beside a worker: the components of the manifests, and the profiles of compose."""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import kubernetes_validate
import pytest
import yaml

from forebay_contracts.settings import InferenceSettings, load
from forebay_inference.engine.served.dialects import DIALECTS
from forebay_inference.engine.served.pooling import POOLING
from forebay_inference.engine.served.process import filled
from support.manifests import DEPLOY, Manifests, Object, kustomized

COMPOSE = yaml.safe_load((DEPLOY.parent / "compose.served.yaml").read_text())
IMAGES = {
    "vllm": "vllm/vllm-openai:v0.32.0",
    "sglang": "lmsysorg/sglang:v0.5.19",
    "llamacpp": "ghcr.io/ggml-org/llama.cpp:server",
    "llamacpp-cuda": "ghcr.io/ggml-org/llama.cpp:server-cuda",
}


class Served(NamedTuple):
    component: str
    manifests: Manifests
    settings: InferenceSettings

    @property
    def pod(self) -> Object:
        return self.manifests.workload("forebay-inference").pod

    @property
    def engine(self) -> Object:
        fetch, engine = self.pod["initContainers"]
        assert (fetch["name"], engine["name"]) == ("fetch", "engine")
        found: Object = engine
        return found


@pytest.fixture(scope="module", params=IMAGES)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """An overlay with a component, as docs/kubernetes.md says to choose it; and the settings of its worker."""
    copy = tmp_path_factory.mktemp("deploy") / "deploy"
    shutil.copytree(DEPLOY.parent, copy)
    overlay = "single-node" if request.param == "llamacpp" else "production"
    file = copy / "kubernetes" / "overlays" / overlay / "kustomization.yaml"
    text = re.sub(r"0\.1\.0-(cuda|cpu)", "0.1.0-served", file.read_text())
    text = text.replace("components/gpu", f"components/{request.param}")
    if overlay == "single-node":
        text += "components:\n  - ../../components/llamacpp\n"
    file.write_text(text)
    manifests = kustomized(overlay, copy / "kubernetes")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in manifests.environment("forebay-inference").items():
            patch.setenv(name, value)
        return Served(request.param, manifests, load(InferenceSettings, _env_file=None))


def words(command: str, environment: Mapping[str, str]) -> list[str]:
    """The words that a shell makes of a command."""
    printed = command.replace("exec ", "printf '%s\\n' ", 1)
    done = subprocess.run(["/bin/sh", "-c", printed], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def environment(served: Served) -> dict[str, str]:
    found = {}
    for one in served.engine["env"]:
        if (key := one.get("valueFrom", {}).get("configMapKeyRef")) is None:
            found[one["name"]] = one["value"]
        elif (value := served.manifests.config(key["name"]).get(key["key"])) is not None:
            found[one["name"]] = value
    return found


@pytest.mark.parametrize("task", ["", "embed", "rerank"])
def test_the_server_is_started_as_the_worker_would_start_it(served: Served, task: str, tmp_path: Path) -> None:
    settings = served.settings
    assert settings.inference_engine == served.component.removesuffix("-cuda")
    assert settings.engine_url == "http://127.0.0.1:8000"
    (tmp_path / "config.json").write_text('{"torch_dtype": "bfloat16"}')
    (command,) = served.engine["args"]
    command = command.replace("/tmp/model/config.json", f"{tmp_path}/config.json")
    given = words(command, environment(served) | {"MODEL_TASK": task, "PATH": os.environ["PATH"]})
    assert given == [*given[: given.index("--host")], *wanted(settings, task)]
    assert "/tmp/model" in given


def wanted(settings: InferenceSettings, task: str) -> list[str]:
    """The options, from `--host` on, with which a worker would start the server."""
    engine = settings.inference_engine
    if engine == "llamacpp":  # the worker's own is another program
        task_option = {"": [], "embed": ["--embedding"], "rerank": ["--reranking"]}[task]
        limits = ["--parallel", str(settings.slots), "--metrics", "--cache-ram", "512"]
        return ["--host", "127.0.0.1", "--port", "8000", *limits, *task_option]
    pooling: Any = task
    dialect = POOLING[engine](pooling) if task else DIALECTS[engine]()
    values = {"name": "-", "port": 8000, "slots": settings.slots, "dtype": "bfloat16"}
    command = filled(dialect.command(settings), values)
    options = command[command.index("--host") :]
    # What vLLM gets on this machine without a GPU.
    return options[: options.index("--kv-cache-memory-bytes")] if "--kv-cache-memory-bytes" in options else options


def test_the_server_outlives_the_worker_and_has_an_hour_to_load(served: Served) -> None:
    engine = served.engine
    assert engine["restartPolicy"] == "Always"
    for kind in ("startupProbe", "livenessProbe"):
        assert engine[kind]["exec"]["command"] == ["curl", "-sf", f"{served.settings.engine_url}/health"]
    startup = engine["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] == served.settings.engine_start_timeout


def test_the_server_alone_has_the_gpu_and_no_container_has_rights(served: Served) -> None:
    worker = served.manifests.workload("forebay-inference").container
    fetch, engine = served.pod["initContainers"]
    assert engine["image"] == IMAGES[served.component]
    assert f"| `{engine['image']}` |" in (DEPLOY.parents[1] / "docs" / "engines.md").read_text()
    assert fetch["image"] == worker["image"] == "forebay-inference:0.1.0-served"
    with_gpu = [one["name"] for one in (fetch, engine, worker) if "nvidia.com/gpu" in one["resources"]["limits"]]
    assert with_gpu == ([] if served.component == "llamacpp" else ["engine"])
    assert fetch["securityContext"] == engine["securityContext"] == worker["securityContext"]
    volumes = {volume["name"] for volume in served.pod["volumes"]}
    assert {mount["name"] for one in (fetch, engine) for mount in one["volumeMounts"]} <= volumes
    assert "hub" not in {mount["name"] for mount in engine["volumeMounts"]}
    kubernetes_validate.validate(served.manifests.one("Deployment", "forebay-inference"), "1.31", strict=True)


def test_compose_starts_the_same_server(served: Served) -> None:
    name = served.settings.inference_engine
    service: dict[str, Any] = COMPOSE["services"][name]
    worker = COMPOSE["services"]["inference"]
    assert service["image"] == IMAGES[name]
    assert service["profiles"] == [name]
    (command,) = served.engine["args"]
    (composed,) = service["command"]
    assert composed.replace("$$", "$") == command.replace("/tmp/model", "/data/served").replace("127.0.0.1", "0.0.0.0")
    assert service["healthcheck"]["test"][1:] == served.engine["livenessProbe"]["exec"]["command"]
    assert (service["tmpfs"], service["read_only"]) == (["/tmp:exec"], True)
    assert service["networks"]["default"]["aliases"] == ["engine"]
    assert worker["environment"]["ENGINE_URL"] == "http://engine:8000"
    assert worker["environment"].keys() <= {name.upper() for name in InferenceSettings.model_fields}
    assert worker["depends_on"][name] == {"condition": "service_started", "required": False}
