"""The chart deploy/helm: each object fits Kubernetes, and its numbers follow from models and GPUs."""

import re
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from test_object_schemas import OPERATORS, group, operator_schema

from forebay_contracts.settings import ApiSettings, InferenceSettings, Settings
from forebay_contracts.wire import names
from support import helm
from support.manifests import DEPLOY, Manifests, settings

pytestmark = pytest.mark.deploy

QWEN: dict[str, Any] = {"model": "Qwen/Qwen2.5-7B-Instruct", "gpus": 1, "slots": 12, "queue": 600, "memoryGiB": 16}
SMOL: dict[str, Any] = {"model": "HuggingFaceTB/SmolLM2-135M-Instruct", "slots": 4, "queue": 200}
E5: dict[str, Any] = {"model": "intfloat/e5-base-v2", "engine": "embedding", "task": "embed", "workers": 2, "slots": 8}
RERANKER: dict[str, Any] = {
    "model": "gpustack/bge-reranker-v2-m3-GGUF/bge-reranker-v2-m3-Q8_0.gguf",
    "gpus": 2,
    "engine": "llamacpp",
    "task": "rerank",
    "slots": 8,
}
EXISTING: dict[str, Any] = {"enabled": False, "url": "tls://nats.example:4222"}
OPEN: dict[str, Any] = {"enabled": False, "url": "nats://nats:4222", "auth": "none", "tlsSecret": ""}
PRODUCTION: dict[str, Any] = yaml.safe_load((helm.CHART / "production.yaml").read_text())
NAMESPACE = {"namespaceSelector": {"matchLabels": {"team": "llm"}}}
DIGESTS = {image: f"sha256:{number:064}" for number, image in enumerate(("api", "cpu", "cuda"))}
ELSEWHERE: dict[str, Any] = {
    "nodeSelector": {"pool": "1"},
    "tolerations": [{"key": "pool", "operator": "Exists"}],
    "affinity": {"nodeAffinity": {}},
    "runtimeClassName": "nvidia",
    "priorityClassName": "",
}
OUTSIDE: dict[str, Any] = {
    "ingress": {"enabled": True, "host": "llm.example", "tlsSecret": "llm-tls", "className": "nginx"},
    "gateway": {"enabled": True, "parentRefs": [{"name": "public"}], "hostnames": ["llm.example"]},
}

CASES: dict[str, dict[str, Any]] = {
    "one GPU": {"models": {"qwen": QWEN}},
    "three GPUs": {"models": {"qwen": QWEN | {"gpus": 3, "engine": "vllm"}}} | PRODUCTION | OUTSIDE,
    "two models": {"models": {"smol": SMOL, "e5": E5}, "api": {"keys": "[keys]"}, "huggingFace": {"token": "hf_x"}},
    "rerank": {"models": {"qwen": QWEN | {"engine": "sglang"}, "bge": RERANKER}} | PRODUCTION,
    "existing NATS": {"models": {"qwen": QWEN}, "nats": EXISTING},
    "Synadia Cloud": {
        "models": {"qwen": QWEN},
        "nats": EXISTING | {"auth": "credentials", "tlsSecret": "", "replicas": 3},
    },
    "open NATS": {"models": {"smol": SMOL}, "nats": OPEN},
    # Keys that YAML takes for a number and a boolean.
    "odd": {
        "models": {
            "123": QWEN | ELSEWHERE,
            "true": SMOL | ELSEWHERE | {"model": "模型", "settings": {"DRAIN_TIMEOUT": "45.5"}},
        },
        "api": ELSEWHERE,
        "nats": ELSEWHERE | {"storage": "1T"},
        "images": {"registry": "registry.example:5000/", "pullSecrets": ["007"], "digests": dict(DIGESTS)},
        "autoscaling": {"workers": {"enabled": True, "minReplicas": 3}},
        "monitoring": {"enabled": True, "labels": {"release": "prometheus"}},
        "networkPolicies": {
            "clients": [NAMESPACE],
            "scrapers": [NAMESPACE],
            "dns": [NAMESPACE],
            "egress": [{"to": [NAMESPACE]}],
        },
        "ipFamily": "IPv6",
    },
    "NATS with a password": {
        "models": {"qwen": QWEN},
        "nats": EXISTING | {"url": "tls://[2001:db8::1]:4333,tls://nats.example", "auth": "url"},
    },
    "NATS with client certificates": {"models": {"qwen": QWEN}, "nats": EXISTING | {"auth": "certificate"}},
}
PORTS = {"NATS with a password": [4333, 4222]}


def chart(values: dict[str, Any], name: str = "chart", **options: Any) -> Manifests:
    return Manifests(name, helm.render(values, **options))


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Manifests:
    return chart(CASES[request.param], request.param)


# --- Kubernetes ---


@pytest.mark.parametrize("version", ["1.31", "1.37"])
def test_kubernetes_and_the_operators_know_every_field(case: Manifests, version: str) -> None:
    for found in case.objects:
        if group(found) in OPERATORS:
            operator_schema(found["kind"], found["apiVersion"]).validate(found)
        else:
            kubernetes_validate.validate(found, version, strict=True)


def test_selectors_find_one_workload(case: Manifests) -> None:
    for found in case.of("Deployment", "StatefulSet"):
        own = case.workload(found["metadata"]["name"])
        assert case.selected(found["spec"]["selector"]) == [own]
        for spread in own.pod.get("topologySpreadConstraints", ()):
            assert case.selected(spread["labelSelector"]) == [own]
    for budget in case.of("PodDisruptionBudget"):
        assert len(case.selected(budget["spec"]["selector"])) == 1
    for service in case.of("Service"):
        (target,) = case.selected({"matchLabels": service["spec"]["selector"]})
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= target.ports.keys()
    for policy in case.of("NetworkPolicy"):
        assert case.selected(policy["spec"]["podSelector"])


def test_what_is_mounted_is_there_or_documented(case: Manifests) -> None:
    given = {found["metadata"]["name"] for found in case.of("Secret", "ConfigMap")}
    documented = (DEPLOY.parents[1] / "docs" / "kubernetes.md").read_text()
    for name in (
        set(re.findall(r"\bforebay-(?:nats-(?:api|admin|inference|tls|keys)|api-keys|hub)\b", case.text)) - given
    ):
        assert name in documented or name.rpartition("-")[0] + "-$role" in documented
    for workload in case.workloads():
        volumes = {volume["name"] for volume in workload.pod["volumes"]}
        for container in (*workload.pod.get("initContainers", ()), *workload.pod["containers"]):
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes | {"data"}
            for source in container.get("envFrom", ()):
                assert source["configMapRef"]["name"] in given | {"forebay-nats-keys"}


@pytest.mark.parametrize("name", ["three GPUs", "existing NATS"])
def test_checkov_finds_nothing(name: str, tmp_path: Path) -> None:
    found = chart(CASES[name])
    for one in found.objects:
        one["metadata"]["namespace"] = "forebay"  # Helm's --namespace
    file = tmp_path / "rendered.yaml"
    file.write_text(yaml.safe_dump_all(found.objects))
    checkov = helm.helm_python().with_name("checkov")
    done = subprocess.run(
        [checkov, "--config-file", DEPLOY / ".checkov.yaml", "-f", file], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


# --- The numbers ---


def test_numbers_follow_from_models_and_gpus(case: Manifests) -> None:
    models = CASES[case.name]["models"]
    topology = next(one for one in case.workloads() if one.kind == "Job")
    assert {one["name"] for one in topology.pod["containers"]} == models.keys()
    queue = sum(one.get("queue", 100) * (one.get("gpus") or one.get("workers", 1)) for one in models.values())
    for key, model in models.items():
        workers = model.get("gpus") or model.get("workers", 1)
        worker = settings(InferenceSettings, case.environment(f"forebay-inference-{key}"))
        (container,) = (one for one in topology.pod["containers"] if one["name"] == key)
        # With `auth: url`, the address is in a Secret.
        applied = settings(Settings, {"NATS_URL": worker.nats_url or ""} | case.environment_of(container))
        # Each service may apply the topology: all have to want the same.
        assert applied == settings(Settings, case.environment(f"forebay-inference-{key}") | {"DATA_DIR": ""})
        assert worker.slots == model["slots"]
        assert worker.max_concurrent_requests == model["slots"] * workers
        assert worker.max_queue_size == queue
        assert worker.model_task == model.get("task", "auto")
        api = settings(ApiSettings, case.environment("forebay-api"))
        assert api.batch_window >= 2 * worker.max_concurrent_requests
        for scaled in case.of("ScaledObject"):
            if scaled["metadata"]["name"] == f"forebay-inference-{key}":
                metadata = scaled["spec"]["triggers"][0]["metadata"]
                assert metadata["consumer"] == names.model_token(worker.served_model)
                for room in scaled["spec"]["triggers"][1:]:
                    assert room["metadata"]["threshold"] == str(worker.slots)
                    assert room["metadata"]["query"].count(f'model="{worker.served_model}"') == 3
                assert (scaled["spec"]["maxReplicaCount"], metadata["lagThreshold"]) == (workers, str(worker.slots))
    assert len(case.of("ScaledObject")) in (0, len(models))


@pytest.mark.parametrize("engine", ["vllm", "sglang", "llamacpp"])
def test_values_of_a_plan_for_a_server_start_it_as_planned(engine: str) -> None:
    values = helm.planned(f"plan --gpu-memory 24GiB --model 8B --engine {engine}")
    (model,) = values["models"].values()
    model["model"] = "org/name/file.gguf" if engine == "llamacpp" else "org/name"
    found = chart(values)
    ((fetch, server),) = (one.pod["initContainers"] for one in found.workloads() if "initContainers" in one.pod)
    assert fetch["args"] == ["fetch", "--link", "/tmp/model"]
    assert server["args"][0].endswith(model["engineOptions"])
    assert f" {model['slots']} " in server["args"][0]
    assert server["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_odd_values_reach_every_pod() -> None:
    found = chart(CASES["odd"], "odd")
    gpu = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    for workload in found.workloads():
        first = [gpu] if workload.name.endswith("123") else []
        given = ELSEWHERE | {"tolerations": [*first, *ELSEWHERE["tolerations"]]}
        assert {name: workload.pod.get(name, "") for name in given} == given, workload.name
        assert workload.pod["imagePullSecrets"] == [{"name": "007"}]
    api, worker = found.workload("forebay-api"), found.workload("forebay-inference-123")
    assert api.container["image"] == f"registry.example:5000/forebay-api:0.1.0@{DIGESTS['api']}"
    assert worker.container["image"].endswith(f":0.1.0-cuda@{DIGESTS['cuda']}")
    assert found.environment("forebay-api")["API_HOST"] == found.environment(worker.name)["METRICS_HOST"] == "::"
    assert found.workload("forebay-inference-true").pod["terminationGracePeriodSeconds"] == 76
    assert {one["spec"]["minReplicaCount"] for one in found.of("ScaledObject")} == {1}  # no more than there are GPUs
    assert "MAX_STORE: 800GB " in found.config("nats-config")["site.conf"]
    assert found.one("PodMonitor", "forebay-inference")["metadata"]["labels"]["release"] == "prometheus"
    for policy in ("dns", "api", "inference", "nats", "nats-clients"):
        assert "team: llm" in yaml.safe_dump(found.one("NetworkPolicy", policy)), policy


def test_further_variables_reach_each_container_of_a_model() -> None:
    secret = {"name": "VLLM_API_KEY", "valueFrom": {"secretKeyRef": {"name": "vllm", "key": "key"}}}
    bare: dict[str, Any] = {"limits": {"nvidia.com/gpu": 2}}
    values = {
        "models": {"qwen": QWEN | {"engine": "vllm", "env": [secret], "resources": bare}},
        "api": {"resources": None},
    }
    found = chart(values)
    pod = found.workload("forebay-inference-qwen").pod
    containers = (*pod["initContainers"], *pod["containers"])
    assert [secret in one["env"] for one in containers] == [True] * 3
    assert [one["resources"] == bare for one in containers] == [False, True, False]
    assert "resources" not in found.workload("forebay-api").container


# --- NATS, secrets, refusals ---


def test_an_existing_nats_needs_nothing_of_the_charts(case: Manifests) -> None:
    nats = CASES[case.name].get("nats", {})
    if nats.get("enabled", True):
        assert case.one("StatefulSet", "nats")
        return
    assert not case.of("StatefulSet")
    loaded = settings(ApiSettings, case.environment("forebay-api"))
    assert loaded.nats_url == nats["url"]
    assert (loaded.nats_nkey_seed is not None) == (nats.get("auth", "nkey") == "nkey")
    assert (loaded.nats_credentials is not None) == (nats.get("auth") == "credentials")
    assert (
        (loaded.nats_tls_cert is not None) == (loaded.nats_tls_key is not None) == (nats.get("auth") == "certificate")
    )
    for workload in case.workloads():
        # The address with the password is in no ConfigMap, and wins over the other.
        own = [one for one in workload.pod["containers"][0]["env"] if one["name"] == "NATS_URL" and "value" not in one]
        assert [one["valueFrom"]["secretKeyRef"]["key"] for one in own] == ["url"] * (nats.get("auth") == "url")
    assert (loaded.nats_tls_ca is not None) == (nats.get("tlsSecret", "x") != "")
    anywhere = [{"ipBlock": {"cidr": "0.0.0.0/0"}}, {"ipBlock": {"cidr": "::/0"}}]
    ports = [{"protocol": "TCP", "port": port} for port in PORTS.get(case.name, [4222])]
    assert case.one("NetworkPolicy", "nats-clients")["spec"]["egress"] == [{"to": anywhere, "ports": ports}]


def test_large_numbers_are_written_whole() -> None:
    bytes_ = 2_147_483_648
    model = QWEN | {"queue": 2_000_000, "settings": {"ENGINE_START_TIMEOUT": 0.5, "LLM_BATCH_SIZE": 1_000_000}}
    values = {"settings": {"ANSWER_LOG_BYTES": bytes_}, "api": {"settings": {"MAX_FILE_BYTES": bytes_}}}
    found = chart({"models": {"qwen": model}} | values)
    assert (
        found.environment("forebay-api").items() >= {"MAX_FILE_BYTES": str(bytes_), "MAX_QUEUE_SIZE": "2000000"}.items()
    )
    worker = found.environment("forebay-inference-qwen")
    assert (worker["ENGINE_START_TIMEOUT"], worker["LLM_BATCH_SIZE"]) == ("0.5", "1000000")
    (topology,) = (one for one in found.workloads() if one.kind == "Job")
    assert found.environment_of(topology.container)["ANSWER_LOG_BYTES"] == str(bytes_)


def test_secrets_are_made_from_values_alone() -> None:
    assert not chart(CASES["one GPU"]).of("Secret")
    made = {one["metadata"]["name"] for one in chart(CASES["two models"]).of("Secret")}
    assert made == {"forebay-api-keys", "forebay-hub"}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({}, "forebay plan"),
        ({"models": {"qwen": QWEN | {"gpu": 2}}}, "gpu"),
        ({"models": {"Qwen": QWEN}}, "Qwen"),
        ({"models": {"qwen": QWEN | {"settings": {"WORKER_SLOTS": 3}}}}, "WORKER_SLOTS"),
        ({"models": {"qwen": QWEN}, "defaultModel": "smol"}, "there is no smol in models"),
        ({"models": {"qwen": QWEN}, "nats": {"enabled": False}}, "nats.url is empty"),
        (
            {"models": {"qwen": QWEN}, "nats": EXISTING, "autoscaling": {"workers": {"enabled": True}}},
            "nats.monitoring",
        ),
        ({"models": {"qwen": QWEN}, "gateway": {"enabled": True}}, "gateway.parentRefs"),
        ({"models": {"qwen": QWEN}, "nats": {"replicas": 2}}, "replicas"),
        ({"models": {"qwen": QWEN}, "nats": {"url": "nats://nats:4222"}}, "set nats.enabled to false"),
        ({"models": {"qwen": QWEN}, "nats": {"tlsSecret": ""}}, "nats.tlsSecret"),
        (
            {"models": {"a": QWEN, "b": SMOL | {"settings": {"MODEL_NAME": "Qwen-Qwen2-5-7B-Instruct"}}}},
            "a and models.b",
        ),
        ({"models": {"qwen": QWEN | {"workers": 2}}}, "give gpus or workers"),
        (
            {"models": {"qwen": QWEN}, "autoscaling": {"api": {"enabled": True, "minReplicas": 11}}},
            "minReplicas is above maxReplicas",
        ),
    ],
)
def test_values_that_cannot_be_are_refused_with_a_sentence(values: dict[str, Any], says: str) -> None:
    with pytest.raises(helm.ChartError, match=re.escape(says)):
        helm.render(values)
