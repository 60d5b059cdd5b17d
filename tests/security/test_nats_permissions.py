"""deploy/nats/forebay.conf on a real server: what each role may do, what it may not, and the system within that."""

import asyncio
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from forebay_contracts.nats import streams, topology
from forebay_contracts.nats.connection import connect
from forebay_contracts.nats.permissions import covers
from forebay_contracts.queueing.deliveries import PULL_EXPIRES_S, PULL_GRACE_S
from forebay_contracts.settings import Settings, load
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import ConfigurationError, QueueUnavailable
from forebay_contracts.wire.state import RequestState, RequestStatus
from support.nats import NatsServer, flushed
from support.secured import DEPLOY, ROLES, Site, init, running
from support.stack import MODEL

CONSUMER = f"HuggingFaceTB-{MODEL}"
DOC = Path(__file__).parents[2] / "docs" / "security-nats.md"

JS = "$JS.API."
ACTIONS: dict[str, tuple[str, str, set[str]]] = {
    "publish-request": ("publish", f"inference.requests.{CONSUMER}.chat", {"api"}),
    "defer-request": ("publish", f"inference.deferred.{CONSUMER}.some-key", {"api"}),
    "put-request-back": ("publish", f"inference.yielded.{CONSUMER}.some-key", {"inference"}),
    "read-deferred": ("publish", f"{JS}DIRECT.GET.INFERENCE_DEFERRED", {"api", "operator", "admin"}),
    "remove-deferred": ("publish", f"{JS}STREAM.MSG.DELETE.INFERENCE_DEFERRED", {"api", "admin"}),
    "say-idle": ("publish", f"inference.idle.{CONSUMER}", {"inference"}),
    "hear-idle": ("hear", "inference.idle.*", {"api", "operator", "admin"}),
    "hear-waiting": ("hear", "inference.waiting.*", {"api", "operator", "admin"}),
    "imitate-waiting": ("publish", f"inference.waiting.{CONSUMER}", set()),
    "pass-notice-on": ("publish", f"inference.admitted.{CONSUMER}", {"inference"}),
    "hear-admitted": ("hear", "inference.admitted.*", {"inference", "operator", "admin"}),
    "hear-requests": ("hear", "inference.requests.>", {"operator", "admin"}),
    "pull": ("publish", f"{JS}CONSUMER.MSG.NEXT.INFERENCE.{CONSUMER}", {"inference", "admin"}),
    "ack": ("publish", f"$JS.ACK.INFERENCE.{CONSUMER}.1.1.1.1.0", {"inference"}),
    "answer": ("publish", "inference.replies.some-api.some-id", {"inference"}),
    "hear-answers": ("hear", "inference.replies.*.*", {"api", "operator", "admin"}),
    "log-answer": ("publish", "inference.answers.some-id", {"api", "inference", "admin"}),
    "read-log": ("publish", f"{JS}DIRECT.GET.INFERENCE_ANSWERS", set(ROLES)),
    "read-end-of-log": ("publish", f"{JS}DIRECT.GET.INFERENCE_ANSWERS.inference.answers.some-id", set(ROLES)),
    "hear-log": ("hear", "inference.answered.*", {"api", "operator", "admin"}),
    "imitate-log": ("publish", "inference.answered.some-id", set()),
    "remove-answer": ("publish", f"{JS}STREAM.PURGE.INFERENCE_ANSWERS", {"api", "admin"}),
    "remove-record-of-answer": ("publish", f"{JS}STREAM.MSG.DELETE.INFERENCE_ANSWERS", {"admin"}),
    "cancel": ("publish", "inference.cancel.some-id", {"api", "inference", "admin"}),
    "ask-again": ("publish", "inference.resend.some-id", {"api"}),
    "drain": ("publish", "inference.drain.some-worker", {"api", "admin"}),
    "pass-on": ("publish", "inference.handover.some-worker", {"inference"}),
    "hear-what-is-passed-on": ("hear", "inference.handover.some-worker", {"inference", "operator", "admin"}),
    "write-state": ("publish", "$KV.inference-requests.some-id", {"api", "inference", "admin"}),
    "read-state": ("publish", f"{JS}DIRECT.GET.KV_inference-requests.$KV.inference-requests.some-id", set(ROLES)),
    "keep-answer": ("publish", "$KV.inference-answers.some-key", {"api"}),
    "read-kept-answer": (
        "publish",
        f"{JS}DIRECT.GET.KV_inference-answers.$KV.inference-answers.some-key",
        {"api", "operator", "admin"},
    ),
    "write-response": ("publish", "$KV.inference-responses.resp.open.some-id", {"api"}),
    "read-response": (
        "publish",
        f"{JS}DIRECT.GET.KV_inference-responses.$KV.inference-responses.resp.open.some-id",
        {"api", "operator", "admin"},
    ),
    "list-responses": ("publish", f"{JS}DIRECT.GET.KV_inference-responses", {"api", "operator", "admin"}),
    "write-file": ("publish", "$O.inference-files.C.some-file", {"api"}),
    "read-file": ("publish", f"{JS}DIRECT.GET.OBJ_inference-files", {"api", "operator", "admin"}),
    "remove-file": ("publish", f"{JS}STREAM.PURGE.OBJ_inference-files", {"api", "admin"}),
    "remove-chunk": ("publish", f"{JS}STREAM.MSG.DELETE.OBJ_inference-files", {"api", "admin"}),
    "write-batch": ("publish", "$KV.inference-batches.batch.open.some-id", {"api"}),
    "read-batch": ("publish", f"{JS}DIRECT.GET.KV_inference-batches", {"api", "operator", "admin"}),
    "queue-batch": ("publish", "inference.batches.some-id", {"api"}),
    "take-batch": ("publish", f"{JS}CONSUMER.MSG.NEXT.INFERENCE_BATCHES.batches", {"api", "admin"}),
    "ack-batch": ("publish", "$JS.ACK.INFERENCE_BATCHES.batches.1.1.1.1.0", {"api"}),
    "announce": ("publish", "inference.webhooks", {"api", "inference", "admin"}),
    "pull-event": ("publish", f"{JS}CONSUMER.MSG.NEXT.INFERENCE_WEBHOOKS.webhooks", {"api", "admin"}),
    "ack-event": ("publish", "$JS.ACK.INFERENCE_WEBHOOKS.webhooks.1.1.1.1.0", {"api"}),
    "keep-failed": ("publish", "inference.failed.open.some-id", {"inference"}),
    "read-failed": ("publish", f"{JS}DIRECT.GET.INFERENCE_FAILED", {"api", "operator", "admin"}),
    "remove-failed": ("publish", f"{JS}STREAM.PURGE.INFERENCE_FAILED", {"api", "admin"}),
    "beat-as-worker": ("publish", "$KV.inference-workers.some-worker", {"inference"}),
    "read-workers": ("publish", f"{JS}DIRECT.GET.KV_inference-workers", set(ROLES)),
    "beat-as-api": ("publish", "$KV.inference-apis.some-api", {"api"}),
    "count": ("publish", "inference.counters.completed", {"api", "inference"}),
    "count-usage": ("publish", "inference.usage.2026-11-30.some-model.some-key", {"api", "inference", "admin"}),
    "thin-usage": ("publish", f"{JS}STREAM.PURGE.INFERENCE_USAGE", {"api", "admin"}),
    "read-usage": ("publish", f"{JS}DIRECT.GET.INFERENCE_USAGE", {"api", "operator", "admin"}),
    "read-limits": ("publish", f"{JS}STREAM.INFO.INFERENCE", set(ROLES)),
    "read-request": ("publish", f"{JS}DIRECT.GET.INFERENCE", {"api", "operator", "admin"}),
    "remove-request": ("publish", f"{JS}STREAM.MSG.DELETE.INFERENCE", {"api", "admin"}),
    "remove-state": ("publish", f"{JS}STREAM.MSG.DELETE.KV_inference-requests", {"admin"}),
    "purge": ("publish", f"{JS}STREAM.PURGE.INFERENCE", {"admin"}),
    "make-stream": ("publish", f"{JS}STREAM.CREATE.OTHER", {"admin"}),
    "change-stream": ("publish", f"{JS}STREAM.UPDATE.INFERENCE", {"admin"}),
    "back-up": ("publish", "$JS.SNAPSHOT.ACK.INFERENCE.some-id.1.1", {"admin"}),
    "restore": ("publish", "$JS.SNAPSHOT.RESTORE.INFERENCE.some-id", {"admin"}),
    "delete-stream": ("publish", f"{JS}STREAM.DELETE.INFERENCE", {"admin"}),
    "make-consumer": ("publish", f"{JS}CONSUMER.CREATE.INFERENCE.other", {"admin"}),
    "watch-bucket": ("publish", f"{JS}CONSUMER.CREATE.KV_inference-requests.other", {"admin"}),
    "change-consumer": ("publish", f"{JS}CONSUMER.DURABLE.CREATE.INFERENCE.{CONSUMER}", {"admin"}),
    "delete-consumer": ("publish", f"{JS}CONSUMER.DELETE.INFERENCE.{CONSUMER}", {"admin"}),
    "pause": ("publish", f"{JS}CONSUMER.PAUSE.INFERENCE.{CONSUMER}", {"api", "admin"}),
    "hear-inboxes-of-apis": ("hear", "_INBOX.api.>", {"api"}),
    "hear-inboxes-of-workers": ("hear", "_INBOX.inference.>", {"inference"}),
    "hear-inboxes-of-people": ("hear", "_INBOX.cli.>", {"operator", "admin"}),
    "hear-everything": ("hear", ">", set()),
    "ask-the-server": ("publish", "$SYS.REQ.SERVER.PING", set()),
}
"""What can be done, as the server sees it, and who may."""


def within(role: str, subject: str) -> str:
    """What the server makes of a subject in the account of this role."""
    return subject if role == "admin" else subject.replace(JS, "$JS.FOREBAY.")


CELLS = [(role, action) for action in ACTIONS for role in ROLES]


async def everything(site: Site) -> list[Any]:
    """All that is stored and configured, as `admin` sees it, and one waiting request there."""
    link = await site.connect("admin")
    try:
        await topology.ensure(link, load(Settings, _env_file=None), load(Settings, _env_file=None).served_model)
        js = link.jetstream
        live = [await js.stream_info(config.name) for config in streams.stream_configs(load(Settings))]
        consumer = await js.consumer_info("INFERENCE", CONSUMER)
        held = [(info.config, info.state.last_seq, info.state.consumer_count) for info in live]
        return [*held, live[0].state.messages, consumer.config, consumer.num_ack_pending, consumer.paused]
    finally:
        await link.close()


@pytest.mark.parametrize(("role", "action"), CELLS, ids=[f"{role}-{action}" for role, action in CELLS])
async def test_who_may_do_what(site: Site, role: str, action: str) -> None:
    kind, subject, allowed = ACTIONS[action]
    before = await everything(site)
    async with site.client(role) as (client, refusals, heard):
        if kind == "publish":
            # JetStream's API refuses a body that is no JSON: what is allowed changes nothing either.
            await client.publish(subject, b"no json")
        else:
            await client.subscribe(subject)
        word = "publish" if kind == "publish" else "subscription"
        refused = within(role, subject).lower()
        expected = [] if role in allowed else [f'nats: permissions violation for {word} to "{refused}"']
        # The server answers in order: what nobody may comes last, and everything that is refused before it.
        await client.publish("what.nobody.may", b"")
        async with asyncio.timeout(30):
            while not refusals or "what.nobody.may" not in refusals[-1]:
                await heard.wait()
                heard.clear()
        assert refusals[:-1] == expected
    if role not in allowed:
        assert await everything(site) == before


@pytest.mark.parametrize("role", [role for role in ROLES if role != "admin"])
async def test_no_answer_goes_where_its_asker_may_not_send(own_site: Site, role: str) -> None:
    denied = [subject for kind, subject, allowed in ACTIONS.values() if kind == "publish" and role not in allowed]
    async with running(own_site, apis=0, workers=0) as stack, own_site.client("api") as (api, _, _):
        js = stack.connection.jetstream
        await js.publish("$KV.inference-requests.some-id", b"{}")
        await api.request(f"inference.requests.{CONSUMER}.chat", b"{}")
        heard = await stack.connection.client.subscribe("inference.>")
        await flushed(stack.connection.client)
        before = await everything(own_site)
        async with own_site.client(role) as (client, _, _):
            read = f"{JS}DIRECT.GET.KV_inference-requests.$KV.inference-requests.some-id"
            for subject in denied:
                # The answer is `{}`, which JetStream takes for an order without options.
                await client.publish(read, b"", reply=subject)
                await client.publish(read, b"", reply=within(role, subject))
            assert (await client.request(read, b"")).data == b"{}"
        assert await everything(own_site) == before
        assert heard.pending_msgs == 0


def test_permissions_and_imports_say_the_same() -> None:
    conf = (DEPLOY / "forebay.conf").read_text()
    for account in ("API", "INFERENCE", "OPERATOR"):
        rights = re.search(rf"^{account}_MAY: {{(.*?)^}}", conf, re.M | re.S)
        section = re.search(rf"^    {account}: {{(.*?)^    }}", conf, re.M | re.S)
        assert rights is not None
        assert section is not None
        may = set(re.findall(r'"([^"]+)"', rights[1].split("subscribe:")[0])) - {"$SYS.REQ.USER.INFO", "_R_.>"}
        may -= {"inference.conversations.*.*", "inference.handover.*"}  # stay in the account of the workers
        imported = {
            (to or subject).replace("$JS.FOREBAY.", "$JS.*.")
            for subject, to in re.findall(r'{ service: {[^}]*subject: "([^"]+)" }(?:, to: "([^"]+)")? }', section[1])
        }
        heard_by_others = set(re.findall(r'{ stream: "([^"]+)", accounts', section[1]))
        assert imported <= may
        assert may - imported <= heard_by_others, account


def test_a_pull_is_remembered_across_accounts_for_longer_than_it_lasts() -> None:
    conf = (DEPLOY / "forebay.conf").read_text()
    (threshold,) = set(re.findall(r'response: stream, threshold: "(\d+)s"', conf))
    assert int(threshold) >= 2 * (PULL_EXPIRES_S + PULL_GRACE_S)


def test_the_table_in_the_documentation_is_this_one() -> None:
    rows = re.findall(
        r"^\|[^|]+\| (yes|no) \| (yes|no) \| (yes|no) \| (yes|no) \| `([a-z-]+)` \|$", DOC.read_text(), re.M
    )
    documented = {row[4]: {role for role, word in zip(ROLES, row[:4], strict=True) if word == "yes"} for row in rows}
    assert documented == {action: allowed for action, (_, _, allowed) in ACTIONS.items()}


async def test_a_value_cannot_take_out_the_others(own_site: Site) -> None:
    async with running(own_site, apis=0, workers=0) as stack, own_site.client("inference") as (client, _, _):
        js = client.jetstream()
        await js.publish("$KV.inference-requests.one", b"{}")
        with pytest.raises(Exception, match="rollup"):
            await js.publish("$KV.inference-requests.two", b"{}", headers={"Nats-Rollup": "all"})
        assert (await stack.connection.jetstream.stream_info("KV_inference-requests")).state.messages == 1


async def test_who_is_not_known_is_refused(site: Site, tmp_path: Path) -> None:
    init(tmp_path / "other")
    with pytest.raises(ConfigurationError, match="refuses this user: set NATS_NKEY_SEED"):
        await site.connect("api", nats_nkey_seed=tmp_path / "other" / "api.seed")
    with pytest.raises(ConfigurationError, match="refuses this user"):
        await site.connect("api", nats_nkey_seed=None)
    with pytest.raises(ConfigurationError, match="holds no NKey seed"):
        await site.connect("api", nats_nkey_seed=site.folder / "ca.pem")
    with pytest.raises(ConfigurationError, match="cannot be read: No such file"):
        await site.connect("api", nats_nkey_seed=tmp_path / "nowhere")


async def test_tls_is_verified_both_ways_round(site: Site, tmp_path: Path, nats_server: NatsServer) -> None:
    init(tmp_path / "other")
    with pytest.raises(QueueUnavailable, match=r"(?i)certificate"):
        await site.connect("api", nats_tls_ca=tmp_path / "other" / "ca.pem")
    with pytest.raises(QueueUnavailable, match=r"(?i)certificate"):
        await site.connect("api", nats_tls_ca=None)
    # A server that speaks plaintext is none that NATS_TLS_CA was set for.
    settings = load(Settings, nats_url=nats_server.url, nats_tls_ca=site.folder / "ca.pem", _env_file=None)
    with pytest.raises(ConfigurationError, match="does not speak TLS"):
        await connect(settings, "tests")


async def test_plaintext_is_refused(site: Site) -> None:
    host, port = site.server.url.removeprefix("nats://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    async with asyncio.timeout(30):
        assert json.loads((await reader.readline()).removeprefix(b"INFO "))["tls_required"] is True
        writer.write(b'CONNECT {"verbose":false}\r\nPING\r\n')
        assert b"PONG" not in await reader.read()
    writer.close()


async def test_a_flood_ends_in_503_and_leaves_room_for_states(tmp_path: Path) -> None:
    """Requests take no more than their share of what may be stored: those that were admitted are seen, and end."""
    site = Site(tmp_path / "site", "--max-store", "4MB")
    site.server.start()
    try:
        async with running(site, workers=0) as stack:
            stream = await stack.connection.jetstream.stream_info(names.STREAM)
            assert stream.config.max_bytes == 2 * 2**20
            answers = await stack.connection.jetstream.stream_info(names.ANSWERS)
            assert answers.config.max_bytes == int(4 * 2**20 * streams.ANSWER_SHARE)
            # An api may not ask for the account's limit, so it wants no other bounds.
            assert not [line for line in stack.apis[0].log if "max_bytes" in line]
            watcher = await (await stack.connection.jetstream.key_value(names.REQUESTS_BUCKET)).watchall()
            flood = [asyncio.create_task(stack.chat("[[tokens=1]] " + "x" * 500_000)) for _ in range(12)]
            fit = 4  # that many into half of it
            for answer in itertools.islice(asyncio.as_completed(flood, timeout=20), len(flood) - fit):
                refused = await answer
                assert refused.status_code == 503
                error = refused.json()["error"]
                assert error["code"] == "queue_full"
                assert "/" not in error["message"]
            states: dict[str, RequestStatus] = {}
            async with asyncio.timeout(20):
                async for entry in watcher:
                    if entry is not None:  # which ends what was there before
                        states[entry.key] = RequestState.model_validate_json(entry.value).status
                    if len(states) == fit:
                        break
            await watcher.stop()
            assert set(states.values()) == {RequestStatus.QUEUED}
            await stack.worker()
            answers = await asyncio.gather(*flood)
            assert [answer.status_code for answer in answers].count(200) == fit
    finally:
        site.server.stop()


def test_patterns_cover_subjects() -> None:
    for pattern, subject, covered in (
        ("a.*", "a.b", True),
        ("a.*", "a.b.c", False),
        ("a.>", "a.b.c", True),
        ("a.>", "a", False),
        (">", "a.*", True),
        ("a.b", "a.*", False),
        ("a.*", "a.>", False),
        ("a.*", "a.*", True),
    ):
        assert covers(pattern, subject) is covered, (pattern, subject)
