"""What the manifests mean: that names find each other, and that numbers fit the settings."""

import re
import shlex
import subprocess
import sys
from pathlib import PurePosixPath
from typing import Any

import pytest
import yaml

from forebay_api.watching.exposition import QueueGauges
from forebay_contracts.settings import ApiSettings, InferenceSettings, Settings, load
from forebay_contracts.wire import names
from support.containers import NATS_IMAGE
from support.manifests import DEPLOY, Manifests, probes

SERVICES = {"forebay-api": ApiSettings, "forebay-inference": InferenceSettings, "forebay-topology": Settings}
DOCS = DEPLOY.parents[1] / "docs" / "kubernetes.md"


def settings(manifests: Manifests, workload: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The settings that a service loads in its container."""
    with monkeypatch.context() as patch:
        for name, value in manifests.environment(workload).items():
            patch.setenv(name, value)
        return load(SERVICES[workload], _env_file=None)


@pytest.mark.parametrize("workload", SERVICES)
def test_every_key_is_a_setting_and_loads(manifests: Manifests, workload: str, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {name.upper() for cls in SERVICES.values() for name in cls.model_fields}
    # The token's file is read by the hub's own library.
    assert manifests.environment(workload).keys() <= known | {"HF_TOKEN_PATH"}
    assert settings(manifests, workload, monkeypatch).nats_url


def test_selectors_find_pods_and_ports_have_names(manifests: Manifests) -> None:
    for found in manifests.of("Deployment", "StatefulSet"):
        own = manifests.workload(found["metadata"]["name"])
        assert manifests.selected(found["spec"]["selector"]) == [own]
        for spread in own.pod.get("topologySpreadConstraints", ()):
            assert manifests.selected(spread["labelSelector"]) == [own]
    for service in manifests.of("Service"):
        (target,) = manifests.selected({"matchLabels": service["spec"]["selector"]})
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= target.ports.keys()
    for budget in manifests.of("PodDisruptionBudget"):
        assert len(manifests.selected(budget["spec"]["selector"])) == 1
    for workload in manifests.workloads():
        for _, probe in probes(workload):
            assert probe["port"] in workload.ports
        if "priorityClassName" in workload.pod:
            manifests.one("PriorityClass", workload.pod["priorityClassName"])


def test_policies_select_pods_and_only_clients_reach_nats(manifests: Manifests) -> None:
    policies = {found["metadata"]["name"]: found["spec"] for found in manifests.of("NetworkPolicy")}
    assert policies["default-deny"]["podSelector"] == {}
    for policy in policies.values():
        targets = manifests.selected(policy["podSelector"])
        assert targets
        for rule in policy.get("ingress", ()):
            assert {port["port"] for port in rule["ports"]} <= targets[0].ports.keys()
    (sources,) = (rule["from"] for rule in policies["nats"]["ingress"] if rule["ports"][0]["port"] == "nats")
    callers = {found.name for source in sources for found in manifests.selected(source["podSelector"])}
    assert callers == {"forebay-api", "forebay-inference", "forebay-topology"}
    assert callers == {found.name for found in manifests.selected(policies["nats-clients"]["podSelector"])}


def test_grace_periods_hold_a_drain(manifests: Manifests, monkeypatch: pytest.MonkeyPatch) -> None:
    api = settings(manifests, "forebay-api", monkeypatch)
    grace = manifests.workload("forebay-api").pod["terminationGracePeriodSeconds"]
    assert grace > api.shutdown_delay + api.drain_timeout
    assert api.shutdown_delay > 0
    assert api.drain_timeout >= api.request_timeout
    worker = settings(manifests, "forebay-inference", monkeypatch)
    assert manifests.workload("forebay-inference").pod["terminationGracePeriodSeconds"] > worker.drain_timeout
    duck = re.search(r'lame_duck_duration: "(\d+)s"', manifests.config("nats-forebay")["forebay.conf"])
    assert duck is not None
    assert manifests.workload("nats").pod["terminationGracePeriodSeconds"] > int(duck[1])


def test_pods_have_the_least_rights(manifests: Manifests) -> None:
    for workload in manifests.workloads():
        pod, container = workload.pod["securityContext"], workload.container["securityContext"]
        assert (pod["runAsNonRoot"], pod["runAsUser"]) == (True, 10001)
        assert pod["seccompProfile"]["type"] == "RuntimeDefault"
        assert container["readOnlyRootFilesystem"]
        assert container["allowPrivilegeEscalation"] is False
        assert container["capabilities"] == {"drop": ["ALL"]}
        assert workload.pod["automountServiceAccountToken"] is False
    labels = manifests.one("Namespace", "forebay")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


def test_replicas_of_streams_are_servers(manifests: Manifests, monkeypatch: pytest.MonkeyPatch) -> None:
    count = settings(manifests, "forebay-topology", monkeypatch).nats_replicas
    assert manifests.one("StatefulSet", "nats")["spec"]["replicas"] == count
    assert len(re.findall(r"nats://nats-\d", manifests.config("nats-config")["cluster.conf"])) in {0, count}


def test_no_secret_is_rendered_and_each_is_documented(manifests: Manifests) -> None:
    assert not manifests.of("Secret")
    wanted = set(re.findall(r"\bforebay-(?:nats-(?:api|admin|inference|tls|keys)|api-keys)\b", manifests.text))
    assert len(wanted) == 6
    assert all(name in DOCS.read_text() or name.rpartition("-")[0] + "-$role" in DOCS.read_text() for name in wanted)


def test_hashed_keys_are_mounted_where_the_api_reads_them(manifests: Manifests) -> None:
    api = manifests.workload("forebay-api")
    assert "API_KEYS" not in {one["name"] for one in api.container["env"]}
    file = PurePosixPath(manifests.environment("forebay-api")["API_KEYS_FILE"])
    (mount,) = (mount for mount in api.container["volumeMounts"] if mount["mountPath"] == str(file.parent))
    assert "subPath" not in mount  # it would not follow a changed Secret
    (volume,) = (volume for volume in api.pod["volumes"] if volume["name"] == mount["name"])
    assert volume["secret"]["secretName"] == "forebay-api-keys"
    # `--from-file` names an entry as the file is called.
    assert re.search(
        rf"generic forebay-api-keys --from-file=\S+/{re.escape(file.name)}$", DOCS.read_text(), re.MULTILINE
    )


def test_images_are_those_of_the_overlays_one_list(manifests: Manifests) -> None:
    listed = yaml.safe_load((DEPLOY / "overlays" / manifests.name / "kustomization.yaml").read_text())["images"]
    named = {f"{image['name']}:{image['newTag']}" for image in listed}
    assert {workload.container["image"] for workload in manifests.workloads()} == named
    assert NATS_IMAGE in named  # the one that all tests and the compose file use


def test_autoscalers_fit_the_settings(production: Manifests, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = settings(production, "forebay-inference", monkeypatch)
    scaled = production.one("ScaledObject", "forebay-inference")["spec"]
    metadata = scaled["triggers"][0]["metadata"]
    assert int(metadata["lagThreshold"]) == worker.slots
    assert scaled["maxReplicaCount"] * worker.slots == worker.max_concurrent_requests
    assert metadata["consumer"] == names.model_token(worker.served_model)
    assert metadata["stream"] == names.STREAM
    room = scaled["triggers"][1]["metadata"]
    assert int(room["threshold"]) == worker.slots
    assert set(re.findall(r'model="(.*?)"', room["query"])) == {worker.served_model}
    gauges = {gauge.name for gauge in QueueGauges().collect()}
    assert set(re.findall(r"forebay_\w+", room["query"])) <= gauges
    for target in (scaled["scaleTargetRef"], production.of("HorizontalPodAutoscaler")[0]["spec"]["scaleTargetRef"]):
        assert "replicas" not in production.one("Deployment", target["name"])["spec"]


def test_a_workers_share_is_the_plans(production: Manifests) -> None:
    text = (DEPLOY / "overlays" / "production" / "inference.env").read_text()
    (command,) = re.findall(r"^# forebay (plan .*)$", text, re.MULTILINE)
    done = subprocess.run(
        [sys.executable, "-m", "forebay_cli", *shlex.split(command)], capture_output=True, text=True, check=True
    )
    plan = dict(line.split("=", 1) for line in done.stdout.splitlines() if re.match(r"[A-Z_]+=", line))
    found = production.environment("forebay-inference")
    assert plan["MAX_CONCURRENT_REQUESTS"] == found["WORKER_SLOTS"]
    assert plan["LLM_BATCH_SIZE"] == found["LLM_BATCH_SIZE"]
    assert plan["MODEL_QUANTIZATION"] == found["MODEL_QUANTIZATION"]
    workers = int(found["MAX_CONCURRENT_REQUESTS"]) // int(found["WORKER_SLOTS"])
    assert int(found["MAX_QUEUE_SIZE"]) == workers * int(plan["MAX_QUEUE_SIZE"])


def test_rules_are_those_of_the_observability_folder(production: Manifests) -> None:
    folder = DEPLOY.parent / "observability"
    wanted = [
        group
        for name in ("recording", "alerts")
        for group in yaml.safe_load((folder / f"{name}.rules.yml").read_text())["groups"]
    ]
    assert production.one("PrometheusRule", "forebay")["spec"]["groups"] == wanted
    assert production.selected(production.one("PodMonitor", "forebay-inference")["spec"]["selector"])
