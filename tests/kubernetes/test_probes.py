"""What the probes ask for is there: the real api and worker, with the settings of each overlay, asked at each path."""

import httpx

from support.manifests import Manifests, probes
from support.nats import NatsServer
from support.stack import running

CLUSTER = {
    "NATS_URL",
    "NATS_TLS_CA",
    "NATS_NKEY_SEED",
    "NATS_REPLICAS",
    "API_HOST",
    "API_PORT",
    "API_KEYS_FILE",
    "DATA_DIR",
}
"""Settings that only fit a cluster."""


def settings(manifests: Manifests, workload: str) -> dict[str, str]:
    """What the container gets, without CLUSTER."""
    found = manifests.environment(workload)
    return {name.lower(): value for name, value in found.items() if name not in CLUSTER} | {"log_format": "text"}


async def test_probes_ask_for_what_is_there(manifests: Manifests, nats_server: NatsServer) -> None:
    api = manifests.workload("forebay-api")
    worker = manifests.workload("forebay-inference")
    assert api.ports == {"http": int(manifests.environment("forebay-api")["API_PORT"])}
    assert worker.ports == {"http": int(manifests.environment("forebay-inference")["METRICS_PORT"])}
    assert manifests.environment("forebay-api")["API_HOST"] == "0.0.0.0"
    assert manifests.environment("forebay-inference")["METRICS_HOST"] == "0.0.0.0"

    async with running(nats_server, apis=0, workers=0) as stack, httpx.AsyncClient() as http:
        started = await stack.api(**settings(manifests, "forebay-api"))
        await stack.worker(
            **settings(manifests, "forebay-inference")
            | {"metrics_host": "127.0.0.1", "metrics_port": 0, "model_device": "cpu"}
        )
        await stack.knows_workers()
        for workload, base in ((api, started.url), (worker, stack.workers[0].url)):
            asked = dict(probes(workload))
            assert asked.keys() == {"startupProbe", "livenessProbe", "readinessProbe"}
            for probe in asked.values():
                answer = await http.get(base + probe["path"])
                assert answer.status_code == 200, answer.text
            assert (await http.get(base + "/metrics")).status_code == 200
