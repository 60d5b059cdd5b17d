"""The chart deploy/helm and the overlays of deploy/kubernetes say the same."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import yaml

from forebay_contracts.settings import ApiSettings, InferenceSettings, Settings
from support import helm
from support.manifests import DEPLOY, Manifests, Object, kustomized, rendered, settings

pytestmark = pytest.mark.deploy

QWEN: dict[str, Any] = {"model": "Qwen/Qwen2.5-7B-Instruct", "gpus": 4, "slots": 12, "queue": 600, "memoryGiB": 16}
SMOL: dict[str, Any] = {"model": "HuggingFaceTB/SmolLM2-135M-Instruct", "slots": 4, "queue": 200}
PRODUCTION: dict[str, Any] = yaml.safe_load((helm.CHART / "production.yaml").read_text())


def chart(values: dict[str, Any]) -> Manifests:
    return Manifests("chart", helm.render(values))


def test_the_plan_writes_values_and_the_chart_is_the_production_overlay() -> None:
    """In a circle: the command in inference.env, its values, four GPUs, and what kustomize renders."""
    text = (DEPLOY / "overlays" / "production" / "inference.env").read_text()
    (command,) = re.findall(r"^# forebay (plan .*)$", text, re.MULTILINE)
    values = helm.planned(command)
    (model,) = values["models"].values()
    assert model.pop("model") == ""  # the plan was given a size
    with pytest.raises(helm.ChartError, match="model"):
        helm.render(values)
    qwen = model | {"model": "Qwen/Qwen2.5-7B-Instruct", "gpus": 4}
    same(chart({"models": {"model": qwen}} | PRODUCTION), rendered("production"))


def test_one_cpu_worker_is_the_single_node_overlay() -> None:
    store = {"size": "10Gi", "accessMode": "ReadWriteOnce"}
    found = chart({"models": {"model": SMOL}, "modelStore": store})
    # These are in the chart whatever the number of nodes is.
    spread = found.one("Deployment", "forebay-api")["spec"]["template"]["spec"]["topologySpreadConstraints"]
    assert spread.pop()["topologyKey"] == "topology.kubernetes.io/zone"
    found.objects = [one for one in found.objects if one["kind"] != "PodDisruptionBudget"]
    same(found, rendered("single-node"))


@pytest.mark.parametrize("engine", ["vllm", "sglang", "llamacpp"])
@pytest.mark.parametrize("task", ["auto", "embed", "rerank"])
def test_a_server_beside_the_worker_is_that_of_the_component(engine: str, task: str, tmp_path: Path) -> None:
    shutil.copytree(DEPLOY.parent, tmp_path / "deploy")
    overlay = tmp_path / "deploy" / "kubernetes" / "overlays" / "production"
    component = "llamacpp-cuda" if engine == "llamacpp" else engine
    file = overlay / "kustomization.yaml"
    file.write_text(file.read_text().replace("components/gpu", f"components/{component}").replace("0-cuda", "0-served"))
    with (overlay / "inference.env").open("a") as env:
        env.write(f"MODEL_TASK={task}\n")
    model = QWEN | {"engine": engine, "task": task}
    model["settings"] = {"MODEL_QUANTIZATION": "none", "LLM_BATCH_SIZE": 512}
    same(chart({"models": {"model": model}} | PRODUCTION), kustomized("production", overlay.parents[1]))


MAY_DIFFER = {
    *("app.kubernetes.io/managed-by", "app.kubernetes.io/part-of", "helm.sh/chart", "forebay/model"),
    *("checksum/settings", "checksum/config", "helm.sh/resource-policy", "namespace"),
    "ttlSecondsAfterFinished",  # Helm deletes the Job of the revision before
}


def same(found: Manifests, wanted: Manifests) -> None:
    """Check that a chart of one model has the objects of an overlay, but for the names of the model's own."""
    ours = {(one["kind"], one["metadata"]["name"]): one for one in map(plain(found), found.objects)}
    theirs = {(one["kind"], one["metadata"]["name"]): one for one in map(plain(wanted), wanted.objects)}
    del theirs["Namespace", "forebay"]
    assert ours.keys() == theirs.keys()
    for name, one in theirs.items():
        assert yaml.safe_dump(ours[name]).splitlines() == yaml.safe_dump(one).splitlines(), name


def plain(manifests: Manifests) -> Callable[[Object], Object]:
    """What makes an object comparable: without what may differ, with the settings that its containers load."""

    def of(found: Object) -> Object:
        one: Object = yaml.safe_load(
            re.sub(r"(forebay-inference|forebay-topology)-[\w-]+", r"\1", yaml.safe_dump(found))
        )
        if found["kind"] == "ConfigMap":
            one["metadata"]["name"] = one["metadata"]["name"].removesuffix("-model")
            # Of files, the lines; the settings are compared in the containers that get them.
            conf = one["data"] if "nats" in one["metadata"]["name"] else {}
            one["data"] = {name: [line for line in text.splitlines() if line.strip()] for name, text in conf.items()}
        if found["kind"] in ("Deployment", "StatefulSet", "Job"):
            pod = one["spec"]["template"]["spec"]
            pod.get("topologySpreadConstraints", []).sort(key=lambda spread: str(spread["topologyKey"]))
            pod["volumes"].sort(key=lambda volume: str(volume["name"]))
            for container in (*pod["containers"], *pod.get("initContainers", ())):
                plain_container(manifests, container, one["metadata"]["name"])
        return cast(Object, without(one))

    return of


def without(found: Any) -> Any:
    """`found` without the keys that may differ, and without what is empty then."""
    if isinstance(found, list):
        return [without(one) for one in found]
    if not isinstance(found, dict):
        return found
    kept = {key: without(value) for key, value in found.items() if key not in MAY_DIFFER}
    return {key: value for key, value in kept.items() if value or key not in ("labels", "annotations")}


def plain_container(manifests: Manifests, container: Object, workload: str) -> None:
    """Replace the environment by the settings that it loads as, and the server's command by its words."""
    classes = {"api": ApiSettings, "inference": InferenceSettings, "fetch": InferenceSettings}
    if container["name"] == "engine":
        container["env"] = {one["name"]: one["value"] for one in container["env"] if "value" in one}
        container["args"] = engine_words(manifests, container["args"][0])
    elif container["name"] != "nats":
        loaded = settings(classes.get(container["name"], Settings), manifests.environment_of(container))
        container["loads"] = {name: str(value) for name, value in loaded}
        if isinstance(loaded, InferenceSettings):
            container["loads"]["worker_slots"] = str(loaded.slots)
        container.pop("envFrom", None)
        container.pop("env", None)
        if "topology" in workload:
            container["name"] = "topology"


def engine_words(manifests: Manifests, command: str) -> list[str]:
    (worker,) = (one for one in manifests.workloads() if one.name.startswith("forebay-inference"))
    environment = manifests.environment_of(worker.container) | {"PATH": os.environ["PATH"]}
    printed = command.replace("python3 -c", "echo", 1).replace("exec ", "printf '%s\\n' ", 1)
    done = subprocess.run(["/bin/sh", "-c", printed], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()
