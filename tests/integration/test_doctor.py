"""`forebay doctor`: each fault is found and its cure named."""

import asyncio
import contextlib
import hashlib
import json
import re
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from test_topology import old_server

from forebay_cli.doctor import permissions
from forebay_contracts.nats import topology
from forebay_contracts.nats.permissions import Permissions, Subjects
from forebay_contracts.nats.presence import Heartbeat
from forebay_contracts.settings import Settings, load
from forebay_contracts.wire import names
from forebay_contracts.wire.heartbeats import WorkerInfo, WorkerStatus
from support.nats import NatsServer
from support.stack import MODEL, Stack, running

CONSUMER = f"HuggingFaceTB-{MODEL}"


async def doctor(env: dict[str, str], data_dir: Path, **settings: object) -> tuple[int | None, dict[str, Any]]:
    """Exit code, and the findings by check, the worst of each first."""
    values = {"DATA_DIR": str(data_dir)} | {name.upper(): str(value) for name, value in settings.items()}
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "forebay_cli", "doctor", "--json", env=env | values, stdout=pipe, stderr=pipe
    )
    async with asyncio.timeout(60):
        stdout, stderr = await process.communicate()
    if process.returncode == 2:
        return 2, {"stderr": stderr.decode()}
    order = ("problem", "warning", "ok")
    found: dict[str, Any] = {}
    for finding in sorted(json.loads(stdout), key=lambda finding: order.index(finding["severity"])):
        assert finding["severity"] == "ok" or finding["fix"], finding
        found.setdefault(finding["check"], finding)
    return process.returncode, found


async def test_a_healthy_deployment(nats_server: NatsServer, tmp_path: Path) -> None:
    async with running(nats_server) as stack:
        code, found = await doctor(stack.env(), tmp_path)
        assert {name: finding["severity"] for name, finding in found.items() if name != "disk"} == dict.fromkeys(
            ("nats", "permissions", "jetstream", "topology", "limits", "clocks", "models", "services", "model"), "ok"
        )
        assert code == (1 if found["disk"]["severity"] == "problem" else 0)
        assert found["services"]["message"] == "1 api, 1 worker processes are alive"
        assert found["clocks"]["message"] == "all 4 agree within 1 s"


async def test_what_is_wrong_with_a_living_system(nats_server: NatsServer, tmp_path: Path) -> None:
    async with running(nats_server, workers=0) as stack:
        async with heartbeat_of(stack, "late", late_s=30, model="another"):
            code, found = await doctor(stack.env(), tmp_path, max_queue_size=7)
        assert code == 1
        assert found["topology"]["message"] == "stream INFERENCE: max_msgs 100 → 7"
        assert "forebay topology apply" in found["topology"]["fix"]
        assert found["models"]["message"] == f"HuggingFaceTB/{MODEL} has no worker; 0 wait"
        assert found["clocks"]["severity"] == "warning"
        assert found["clocks"]["message"].startswith("the clock of late is 30.")
        await stack.connection.jetstream.pause_consumer("INFERENCE", CONSUMER, "2099-01-01T00:00:00Z")
        async with heartbeat_of(stack, "early", progress="fetching 3 %", version="0.0.1"):
            code, found = await doctor(stack.env(), tmp_path)
        assert found["models"]["message"] == f"HuggingFaceTB/{MODEL} is paused until 2099-01-01T00:00:00Z; 0 wait"
        assert found["models"]["fix"] == f"`forebay resume HuggingFaceTB/{MODEL}`"
        assert "of version 0.0.1" in found["services"]["message"]


async def test_nats_that_is_not_there_and_settings_that_cannot_hold(nats_server: NatsServer, tmp_path: Path) -> None:
    env = Stack(nats_server).env()
    nats_server.stop()
    code, found = await doctor(env, tmp_path)
    assert (code, found["nats"]["severity"]) == (1, "problem")
    assert "cannot reach NATS at nats://127.0.0.1:" in found["nats"]["message"]
    assert "NATS_URL" in found["nats"]["fix"]
    assert found["model"]["severity"] == "ok"
    code, found = await doctor(env, tmp_path, max_queue_size=0)
    assert code == 2
    assert "MAX_QUEUE_SIZE" in found["stderr"]


async def test_a_connection_that_is_refused_is_a_finding(nats_server: NatsServer, tmp_path: Path) -> None:
    env = Stack(nats_server).env()
    nowhere = tmp_path / "nowhere"
    no_seed = tmp_path / "no.seed"
    no_seed.write_text("nothing")
    async with old_server("2.10.29") as old:
        for settings, message, fix in (
            ({"nats_url": old}, "nats-server 2.10.29 is too old", "update nats-server"),
            ({"nats_credentials": nowhere}, f"the NATS credentials {nowhere} cannot be read", "set NATS_CREDENTIALS"),
            ({"nats_credentials": no_seed}, f"the NATS credentials {no_seed} hold no user", "set NATS_CREDENTIALS"),
            (
                {"nats_nkey_seed": no_seed},
                f"NATS_NKEY_SEED={no_seed} holds no NKey seed",
                "one line that begins with SU",
            ),
            ({"nats_tls_ca": nowhere}, "the TLS files for NATS cannot be used", "set NATS_TLS_CA"),
        ):
            code, found = await doctor(env, tmp_path, **settings)
            assert (code, found["nats"]["severity"]) == (1, "problem")
            assert message in found["nats"]["message"]
            assert fix in found["nats"]["fix"]
            assert found["model"]["severity"] == "ok"


async def doctor_of_a_server_with(folder: Path, config: str) -> tuple[int | None, dict[str, Any]]:
    """What doctor finds at a server that has this configuration and no JetStream."""
    file = folder / "nats.conf"
    file.write_text(config)
    server = NatsServer(folder, "-c", str(file))
    server.start()
    try:
        return await doctor(Stack(server).env(), folder)
    finally:
        server.stop()


async def test_a_refused_user_is_a_finding(tmp_path: Path) -> None:
    code, found = await doctor_of_a_server_with(tmp_path, 'authorization: { user: "a", password: "b" }')
    assert (code, found["nats"]["severity"]) == (1, "problem")
    assert "refuses this user" in found["nats"]["message"]
    assert "NATS_NKEY_SEED or NATS_CREDENTIALS" in found["nats"]["fix"]


async def test_a_server_without_jetstream(tmp_path: Path) -> None:
    code, found = await doctor_of_a_server_with(tmp_path, "")
    assert (code, found["jetstream"]["severity"]) == (1, "problem")
    assert found["jetstream"]["message"] == "JetStream is off: the server has none"
    assert "`-js`" in found["jetstream"]["fix"]
    assert {name for name, finding in found.items() if finding["severity"] == "problem"} <= {"jetstream", "disk"}


async def test_models_of_one_token_and_models_that_nobody_serves(nats_server: NatsServer, tmp_path: Path) -> None:
    async with running(nats_server) as stack:
        observer = load(Settings, nats_url=nats_server.url)
        await topology.ensure(stack.connection, observer, "org/old")
        code, found = await doctor(stack.env(), tmp_path, model_name="org.old")
        assert code == 1
        assert "both become 'org-old' on NATS" in found["topology"]["message"]
        assert "MODEL_NAME" in found["topology"]["fix"]
        # The checks after it have been made.
        assert found["services"]["severity"] == "ok"
        code, found = await doctor(stack.env(), tmp_path)
        assert (found["models"]["severity"], found["models"]["message"]) == (
            "warning",
            "org/old has no worker; 0 wait",
        )
        assert "`nats consumer rm INFERENCE org-old`" in found["models"]["fix"]
        # Once somebody waits for it, it is missed.
        await stack.connection.jetstream.publish("inference.requests.org-old.chat", b"{}")
        code, found = await doctor(stack.env(), tmp_path)
        assert (code, found["models"]["severity"]) == (1, "problem")
        assert found["models"]["message"] == "org/old has no worker; 1 wait"


CONF = (Path(__file__).parents[2] / "deploy" / "nats" / "forebay.conf").read_text()

OF_OTHERS = {
    # What apis subscribe to that are older than stored answers.
    "api": {"$KV.inference-answers.*"},
    # What `nats` of a person asks, and no command of ours.
    "operator": {"$JS.*.STREAM.NAMES", "$JS.*.STREAM.LIST", "$JS.*.STREAM.MSG.GET.*", "$JS.*.CONSUMER.NAMES.*"}
    | {"inference.>", "$KV.>"},
    "admin": {"inference.>", "$KV.>", "$JS.EVENT.>"},
}


def may(role: str) -> dict[str, list[str]]:
    """What forebay.conf allows a role, without what doctor itself asks by."""
    block = re.search(rf"^{role.upper()}_MAY: (.*?)^}}", CONF, re.MULTILINE | re.DOTALL)
    assert block is not None
    found = {}
    for kind in ("publish", "subscribe"):
        allowed = re.search(rf"{kind}: {{ allow: \[(.*?)\] }}", block[1], re.DOTALL)
        assert allowed is not None
        found[kind] = [subject for subject in re.findall(r'"([^"]+)"', allowed[1]) if subject != "$SYS.REQ.USER.INFO"]
    return found


def lacks(role: str, allowed: dict[str, list[str]]) -> list[str]:
    publish, subscribe = Subjects(allowed["publish"]), Subjects(allowed["subscribe"])
    return permissions.missing(Permissions(role, publish, subscribe), role)


@pytest.mark.parametrize("role", permissions.PUBLISHES)
def test_each_right_of_a_role_is_missed(role: str) -> None:
    allowed = may(role)
    assert lacks(role, allowed) == []
    for kind, subjects in allowed.items():
        for subject in set(subjects) - OF_OTHERS.get(role, set()):
            missed = lacks(role, allowed | {kind: [other for other in subjects if other != subject]})
            assert missed, f"{role} can do without {kind} {subject}"


async def test_a_damaged_model_is_found(nats_server: NatsServer, tmp_path: Path) -> None:
    env = Stack(nats_server).env()
    folder = tmp_path / "models" / f"HuggingFaceTB--{MODEL}-v1"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "SHA256SUMS").write_text(f"{hashlib.sha256(b'{}').hexdigest()}  config.json\n")
    _, found = await doctor(env, tmp_path)
    assert found["model"]["message"] == f"{folder} is complete, its checksums are right"
    (folder / "config.json").write_text("{} ")
    code, found = await doctor(env, tmp_path)
    assert (code, found["model"]["severity"]) == (1, "problem")
    assert found["model"]["message"] == f"{folder}: config.json is not what was written"
    _, found = await doctor(env, tmp_path, default_model=str(tmp_path / "nowhere"))
    assert found["model"]["message"] == f"{tmp_path}/nowhere is not there"


@contextlib.asynccontextmanager
async def heartbeat_of(stack: Stack, worker: str, late_s: float = 0, **fields: Any) -> AsyncIterator[None]:
    """The heartbeat of a worker that loads, by a clock that is `late_s` late."""
    given = {"version": "0.1.0", "model": f"HuggingFaceTB/{MODEL}", "status": WorkerStatus.LOADING} | fields

    def describe() -> WorkerInfo:
        now = time.time() - late_s
        return WorkerInfo(id=worker, slots=1, engine="simulated", started_at=now, heartbeat_at=now, **given)

    heartbeat = Heartbeat(stack.connection, names.WORKERS_BUCKET, describe)
    await heartbeat.start()
    try:
        yield
    finally:
        await heartbeat.stop()
