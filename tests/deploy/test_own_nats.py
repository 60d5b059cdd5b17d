"""docs/own-nats.md on real servers: one account with a user for each role, and an account of an operator with tiers."""

import base64
import hashlib
import json
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import nkeys
import pytest
import pytest_asyncio

from forebay_contracts.nats import topology
from forebay_contracts.nats.connection import connect
from forebay_contracts.settings import Settings, load
from forebay_contracts.wire.state import RequestStatus
from support.command import run
from support.manifests import DEPLOY
from support.nats import NatsServer
from support.stack import MODEL, Stack, started

pytestmark = pytest.mark.deploy

ROLES = ("admin", "api", "inference", "operator")


class OneAccount(Stack):
    """A stack whose services and commands are users of one account."""

    def url(self, role: str) -> str:
        return self.nats.url.replace("nats://", f"nats://{role}:x@")


@pytest_asyncio.fixture
async def one_account(tmp_path: Path) -> AsyncIterator[OneAccount]:
    """The permissions of forebay.conf for users of one account, as docs/own-nats.md says."""
    text = (DEPLOY.parent / "nats" / "forebay.conf").read_text()
    blocks = text[text.index("ADMIN_MAY:") : text.index("# --- Accounts ---")]
    blocks = blocks.replace("publish: { allow: [", 'publish: { allow: [ "_INBOX.>",')
    users = ", ".join(f"{{ user: {role}, password: x, permissions: ${role.upper()}_MAY }}" for role in ROLES)
    (tmp_path / "nats.conf").write_text(
        f'jetstream {{ store_dir: "{tmp_path}/js", max_file_store: 4GB }}\n{blocks}\n'
        f"accounts {{ FOREBAY {{ jetstream: enabled, users: [ {users} ] }} }}\n"
    )
    server = NatsServer(tmp_path, "-c", str(tmp_path / "nats.conf"))
    server.start()
    stack = OneAccount(server)
    applied = await run("topology", "apply", env=stack.env(nats_url=stack.url("admin"), model_name=MODEL))
    assert applied.code == 0, applied.stderr
    admin = load(Settings, nats_url=stack.url("admin"), _env_file=None)
    try:
        async with started(stack, 0, 0, lambda: connect(admin, "tests")):
            await stack.api(nats_url=stack.url("api"), model_name=MODEL)
            await stack.worker(nats_url=stack.url("inference"), model_name=MODEL)
            yield stack
    finally:
        server.stop()
    assert [line for line in server.log if "iolation" in line] == []


async def test_users_of_one_account_do_all_that_forebay_does(one_account: OneAccount) -> None:
    client = one_account.openai()
    assert (await client.responses.create(model=MODEL, input="[[tokens=3]]")).output_text == "t0 t1 t2"
    file = await client.files.create(file=("in.jsonl", b'{"a": 1}\n'), purpose="batch")
    assert (await client.files.content(file.id)).content == b'{"a": 1}\n'
    messages: Any = [{"role": "user", "content": "[[tokens=400 delay_ms=50]]"}]
    stream = await client.chat.completions.create(model=MODEL, messages=messages, stream=True)
    await anext(aiter(stream))
    request_id = stream.response.headers["x-request-id"]
    await stream.close()
    await one_account.reaches(request_id, RequestStatus.CANCELLED)
    (worker,) = one_account.workers
    drained = await run("drain", worker.id, env=one_account.env(nats_url=one_account.url("admin")))
    assert drained.code == 0, drained.stderr


# --- An operator's account, as those of Synadia Cloud are ---


class Identity:
    """An NKey, and the JWTs that it signs."""

    def __init__(self, kind: int) -> None:
        self.seed: bytes = bytes(nkeys.encode_seed(os.urandom(32), kind))
        self._pair = nkeys.from_seed(bytearray(self.seed))
        self.public: str = self._pair.public_key.decode()

    def sign(self, subject: "Identity", claims: dict[str, Any]) -> str:
        body = {"iat": int(time.time()), "iss": self.public, "sub": subject.public, "nats": {"version": 2, **claims}}
        digest = hashlib.sha256(json.dumps(body).encode()).digest()
        body["jti"] = base64.b32encode(digest).decode().rstrip("=")
        signed = ".".join(_encoded(json.dumps(part).encode()) for part in ({"typ": "JWT", "alg": "ed25519-nkey"}, body))
        return f"{signed}.{_encoded(self._pair.sign(signed.encode()))}"


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def operated(folder: Path, tier: dict[str, Any]) -> tuple[NatsServer, Path]:
    """A server with an account of tier R1, and the credentials of a user there."""
    operator, account, system = (
        Identity(kind) for kind in (nkeys.PREFIX_BYTE_OPERATOR, nkeys.PREFIX_BYTE_ACCOUNT, nkeys.PREFIX_BYTE_ACCOUNT)
    )
    user = Identity(nkeys.PREFIX_BYTE_USER)
    counts = ("subs", "data", "payload", "imports", "exports", "conn", "leaf")
    unlimited = {"wildcards": True, **dict.fromkeys(counts, -1)}
    of_account = {"type": "account", "default_permissions": {"pub": {}, "sub": {}}}
    tokens = {
        account.public: operator.sign(account, of_account | {"limits": unlimited | {"tiered_limits": {"R1": tier}}}),
        system.public: operator.sign(system, of_account | {"limits": unlimited}),
    }
    (folder / "operator.jwt").write_text(operator.sign(operator, {"type": "operator", "system_account": system.public}))
    preload = "\n".join(f"{name}: {token}" for name, token in tokens.items())
    (folder / "nats.conf").write_text(
        f'jetstream {{ store_dir: "{folder}/js", max_file_store: 20GB }}\n'
        f'operator: "{folder}/operator.jwt"\nresolver: MEMORY\nresolver_preload: {{\n{preload}\n}}\n'
    )
    of_user = {"type": "user", "pub": {}, "sub": {}, "subs": -1, "data": -1, "payload": -1}
    credentials = folder / "user.creds"
    credentials.write_text(
        f"-----BEGIN NATS USER JWT-----\n{account.sign(user, of_user)}\n------END NATS USER JWT------\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{user.seed.decode()}\n------END USER NKEY SEED------\n"
    )
    return NatsServer(folder, "-c", str(folder / "nats.conf")), credentials


async def test_an_account_with_tiers_has_room_for_all_streams(tmp_path: Path) -> None:
    storage = 10 * 2**30  # of Synadia Cloud's plan Starter, and its streams
    tier = {"mem_storage": 0, "disk_storage": storage, "streams": 20, "consumer": 100, "max_bytes_required": True}
    server, credentials = operated(tmp_path, tier)
    server.start()
    try:
        settings = load(Settings, nats_url=server.url, nats_credentials=credentials, _env_file=None)
        link = await connect(settings, "tests")
        try:
            assert len(await topology.ensure(link, settings, "org/model")) == 18
            assert await topology.ensure(link, settings, "org/model") == []
            bounds = [info.config.max_bytes for info in await link.jetstream.streams_info()]
        finally:
            await link.close()
    finally:
        server.stop()
    assert len(bounds) == 15
    assert all(bound > 0 for bound in bounds)
    assert sum(bounds) <= storage
