"""The chart deploy/helm over its revisions: when the topology is applied, and which pods restart."""

import os
import re
from typing import Any

import pytest
from test_helm import CASES, E5, OPEN, SMOL, chart

from support.command import run
from support.nats import NatsServer

pytestmark = pytest.mark.deploy


def test_the_topology_is_applied_at_each_revision() -> None:
    values = CASES["existing NATS"]
    for options in ({}, {"is_upgrade": True, "is_install": False, "revision": 2}):
        (job,) = chart(values, **options).of("Job")
        assert job["metadata"]["annotations"]["helm.sh/hook"] == "pre-install,pre-upgrade,post-rollback"
        # Nothing of the release is there before the first installation.
        pod = job["spec"]["template"]["spec"]
        assert "priorityClassName" not in pod
        assert all("envFrom" not in one for one in pod["containers"])
    first = chart(CASES["one GPU"]).of("Job")
    second = chart(CASES["one GPU"], is_upgrade=True, is_install=False, revision=2).of("Job")
    assert [re.sub("-[0-9a-f]{8}$", "", job["metadata"]["name"]) for job in (*first, *second)] == [
        "forebay-topology-1",
        "forebay-topology-2",
    ]
    assert "annotations" not in first[0]["metadata"]
    # Argo CD renders each revision as the first: what is changed must have another name.
    (changed,) = chart(CASES["one GPU"] | {"requestTimeout": 60}).of("Job")
    assert changed["metadata"]["name"] != first[0]["metadata"]["name"]


async def test_the_topology_of_two_models_is_what_each_service_wants(nats_server: NatsServer) -> None:
    """The Job's containers, on a real server; then no service finds anything to change, as none may change it."""
    found = chart({"models": {"smol": SMOL, "e5": E5}, "nats": OPEN})

    async def apply(environment: dict[str, str], *options: str) -> str:
        env = os.environ | environment | {"NATS_URL": nats_server.url}
        ended = await run("topology", "apply", *options, env=env)
        assert ended.code == 0, ended.stderr
        return ended.stdout

    (job,) = (one for one in found.workloads() if one.kind == "Job")
    applied = [await apply(found.environment_of(one)) for one in job.pod["containers"]]
    assert "consumer intfloat-e5-base-v2 made" in applied[0]
    assert applied[1] == "consumer HuggingFaceTB-SmolLM2-135M-Instruct made\n"
    assert found.environment("forebay-api")["DEFAULT_MODEL"] == SMOL["model"]  # of requests that name none
    for workload in ("forebay-api", "forebay-inference-e5", "forebay-inference-smol"):
        assert await apply(found.environment(workload), "--dry-run") == "nothing to change\n"


def test_changed_settings_restart_the_pods_that_have_them() -> None:
    def checksums(values: dict[str, Any]) -> dict[str, Any]:
        return {
            one["metadata"]["name"]: one["spec"]["template"]["metadata"]["annotations"]
            for one in chart(values).of("Deployment", "StatefulSet")
        }

    before = checksums(CASES["two models"])
    after = checksums(CASES["two models"] | {"settings": {"LOG_LEVEL": "DEBUG"}})
    assert {name for name in before if before[name] != after[name]} == before.keys() - {"nats"}
    models = CASES["two models"]["models"]
    after = checksums(CASES["two models"] | {"models": models | {"e5": E5 | {"settings": {"LLM_BATCH_SIZE": 64}}}})
    assert {name for name in before if before[name] != after[name]} == {"forebay-inference-e5"}
