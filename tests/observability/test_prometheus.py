"""A real Prometheus scrapes a real system, with our rules; promtool checks them; the dashboard asks what is there."""

import asyncio
import contextlib
import json
import re
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import yaml

from support.metrics import defined
from support.nats import NatsServer
from support.ports import port_of
from support.stack import running

DEPLOY = Path(__file__).parents[2] / "deploy" / "observability"
DOCS = Path(__file__).parents[2] / "docs" / "observability.md"
START_TIMEOUT_S = 60
RECORDED = re.compile(r"forebay:\w+(?::\w+)+")


def run(*command: str | Path) -> str:
    done = subprocess.run(command, cwd=DEPLOY, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_promtool_accepts_rules_and_configuration(promtool: str) -> None:
    assert "FAILED" not in run(promtool, "check", "rules", *sorted(DEPLOY.glob("*.rules.yml")))
    run(promtool, "check", "config", "prometheus.yml")


def test_alerts_fire_when_they_should(promtool: str) -> None:
    assert "SUCCESS" in run(promtool, "test", "rules", "alerts.test.yml")


def test_each_alert_fires_in_some_case() -> None:
    cases = yaml.safe_load((DEPLOY / "alerts.test.yml").read_text())["tests"]
    (group,) = yaml.safe_load((DEPLOY / "alerts.rules.yml").read_text())["groups"]
    fires = {alert["alertname"] for case in cases for alert in case["alert_rule_test"] if alert["exp_alerts"]}
    assert fires == {rule["alert"] for rule in group["rules"]}


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
    return found


def expressions() -> list[str]:
    """Every query of the dashboard, its variables filled in."""
    return [
        target["expr"].replace("$__rate_interval", "1m").replace("$model", ".*")
        for panel in dashboard()["panels"]
        for target in panel.get("targets", ())
    ]


def rule_inputs() -> list[str]:
    """What the recording rules record, and each series that an alert looks at: alerts themselves find nothing."""
    recorded = re.findall(r"record: (\S+)", (DEPLOY / "recording.rules.yml").read_text())
    alerts = re.findall(r"expr: (.*?)(?:for|labels):", (DEPLOY / "alerts.rules.yml").read_text(), re.DOTALL)
    series = re.compile(r"\b(?:up|forebay[_:][\w:]+)\b(?:\{[^}]*\})?")
    return [*recorded, *sorted(set(series.findall(" ".join(alerts))))]


def metric_names(text: str) -> set[str]:
    names = set(re.findall(r"\bforebay_[a-z_]+", text))
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in names}


def test_dashboard_and_rules_know_every_metric_and_no_other() -> None:
    rules = "".join(path.read_text() for path in DEPLOY.glob("*.rules.yml"))
    shown = metric_names(" ".join(expressions()))
    assert shown == set(defined())
    assert metric_names(rules) <= set(defined())


def test_every_panel_has_a_place_and_an_id_of_its_own() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = set()
    for panel in panels:
        place = panel["gridPos"]
        own = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert max(x for x, _ in own) < 24
        assert not cells & own
        cells |= own


def test_docs_say_what_each_alert_means() -> None:
    alerts = re.findall(r"alert: (\w+)", (DEPLOY / "alerts.rules.yml").read_text())
    assert sorted(re.findall(r"^\| `(Forebay\w+)`", DOCS.read_text(), re.MULTILINE)) == sorted(alerts)


@contextlib.asynccontextmanager
async def scraping(prometheus: str, folder: Path, targets: dict[str, str]) -> AsyncIterator[httpx.AsyncClient]:
    """A Prometheus that scrapes each job's target every second and knows our rules."""
    port = port_of(asyncio.current_task())
    rules = [
        path.read_text().replace("interval: 15s", "interval: 1s").replace("[5m]", "[30s]")
        for path in sorted(DEPLOY.glob("*.rules.yml"))
    ]
    for number, text in enumerate(rules):
        (folder / f"{number}.rules.yml").write_text(text)
    (folder / "prometheus.yml").write_text(
        json.dumps(
            {
                "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
                "rule_files": ["*.rules.yml"],
                "scrape_configs": [
                    {"job_name": job, "static_configs": [{"targets": [target]}]} for job, target in targets.items()
                ],
            }
        )
    )
    process = await asyncio.create_subprocess_exec(
        prometheus,
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=error",
    )
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}/api/v1", trust_env=False, timeout=60) as client:
            async with asyncio.timeout(START_TIMEOUT_S):
                while not await is_ready(client, port):  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
            yield client
    finally:
        process.terminate()
        await process.wait()


async def is_ready(client: httpx.AsyncClient, port: int) -> bool:
    """Whether it answers queries, which it refuses while it reads its store."""
    try:
        return (await client.get(f"http://127.0.0.1:{port}/-/ready")).status_code == 200
    except httpx.TransportError:
        return False


async def query(client: httpx.AsyncClient, expression: str) -> list[dict[str, Any]]:
    answer = (await client.get("/query", params={"query": expression})).json()
    assert answer["status"] == "success", (expression, answer)
    found: list[dict[str, Any]] = answer["data"]["result"]
    return found


async def appears(client: httpx.AsyncClient, expression: str) -> list[dict[str, Any]]:
    """Wait until a query has an answer: Prometheus tells nobody when it has scraped."""
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            while not (found := await query(client, expression)):  # noqa: ASYNC110
                await asyncio.sleep(0.1)
    except TimeoutError:
        raise AssertionError(f"no result: {expression}") from None
    return found


async def test_prometheus_scrapes_both_services(nats_server: NatsServer, prometheus: str, tmp_path: Path) -> None:
    folder = tmp_path / "prometheus"
    folder.mkdir()
    async with running(nats_server, metrics_port=0, api_keys="a-key-with-a-name") as stack:
        stack.http.headers["authorization"] = "Bearer a-key-with-a-name"
        services = {"forebay-api": stack.apis[0], "forebay-worker": stack.workers[0]}
        targets = {name: f"127.0.0.1:{service.port}" for name, service in services.items()}
        async with scraping(prometheus, folder, targets) as client:
            await appears(client, "sum(up) == 2")
            # Twice: what is all there at the first scrape has no rate.
            for total in (10, 20):
                for _ in range(10):
                    assert (await stack.chat("[[tokens=4]]")).status_code == 200
                await appears(client, f"sum(forebay_requests_finished_total{{outcome='completed'}}) == {total}")
            await appears(client, "sum(forebay_tokens_total{direction='output'}) == 80")
            (family,) = (
                (await client.get("/metadata", params={"metric": "forebay_queue_wait_seconds"})).json()["data"].values()
            )
            assert family[0]["type"] == "histogram"
            await appears(client, "forebay:tokens:rate5m > 0")
            for expression in [*expressions(), *rule_inputs()]:
                if "webhook" not in expression:  # there is no receiver here
                    await appears(client, expression)
            answer = (await client.get("/rules")).json()["data"]["groups"]
            broken = [rule for group in answer for rule in group["rules"] if rule["health"] == "err"]
            assert not broken
            assert not (await client.get("/alerts")).json()["data"]["alerts"]
