"""Keys: kept as hashes, changed without a restart, named in logs and metrics, each with its own bound and view."""

import asyncio
import contextlib
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from forebay_api.clients.keys import ApiKeys
from forebay_contracts import keys
from forebay_contracts.settings import ApiSettings
from forebay_contracts.wire.errors import ConfigurationError
from forebay_contracts.wire.state import RequestStatus
from support.answers import chat_body, error_of, summary, user
from support.nats import NatsServer
from support.stack import MODEL, Stack, running

ALICE, BOB, OPS = (f"fb-{name}-key-of-more-than-sixteen" for name in ("alice", "bob", "ops"))
SLOW = "[[tokens=2000 delay_ms=500]]"
KNOWN: set[str] = set()
"""The ids of requests that were answered, or that do not end by themselves."""


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def entries(**limits: int | None) -> str:
    """A keys file for alice, bob and ops, with the bounds given."""
    names = {"alice": ALICE, "bob": BOB, "ops": OPS}
    return "\n".join(
        keys.written(name, key, max_requests=limits.get(name), operator=name == "ops") for name, key in names.items()
    )


@contextlib.asynccontextmanager
async def with_keys(nats: NatsServer, folder: Path, text: str, **settings: Any) -> AsyncIterator[tuple[Stack, Path]]:
    file = folder / "keys.toml"
    file.write_text(text)
    settings = {"max_concurrent_requests": 8, **settings}
    async with running(nats, api_keys_file=file, log_format="json", **settings) as stack:
        yield stack, file


def counted(text: str, name: str) -> dict[tuple[str, ...], float]:
    """The samples of a counter in the text of /metrics, by its labels."""
    families = text_string_to_metric_families(text)
    return {
        tuple(sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
        if sample.name == name
    }


async def ask(stack: Stack, key: str, text: str = "[[tokens=1]]", api: int = 0, **headers: str) -> httpx.Response:
    answer = await stack.http.post(
        f"{stack.apis[api].url}/v1/chat/completions", json=chat_body(text), headers=bearer(key) | headers
    )
    KNOWN.add(answer.headers["x-request-id"])
    return answer


async def unfinished(stack: Stack, key: str, count: int, api: int = 0) -> list[asyncio.Task[httpx.Response]]:
    """So many requests that a worker is at and that do not end by themselves."""
    tasks = []
    for _ in range(count):
        tasks.append(asyncio.create_task(ask(stack, key, SLOW, api)))
        begun = await stack.becomes(lambda state: state.status is RequestStatus.PROCESSING and state.id not in KNOWN)
        KNOWN.add(begun.id)
    return tasks


async def until(stack: Stack, key: str, status: int, api: int = 0) -> None:
    """Ask until the answer has this status: what an api learns from a file or a heartbeat leaves no event."""
    async with asyncio.timeout(60):
        while (await ask(stack, key, api=api)).status_code != status:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def end(*tasks: asyncio.Task[httpx.Response]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_file_of_hashes_opens_the_door(nats_server: NatsServer, tmp_path: Path) -> None:
    async with with_keys(nats_server, tmp_path, entries(), api_keys="a-plain-key-of-old") as (stack, file):
        for key in (ALICE, BOB, OPS, "a-plain-key-of-old"):
            assert (await ask(stack, key)).status_code == 200
        # What stands in the file is no key itself.
        digest = keys.parse(file.read_text())["alice"].sha256[0]
        for wrong in (digest, ALICE[:-1], ALICE + "x", "alice"):
            assert summary(await ask(stack, wrong)) == (401, "invalid_request_error", "invalid_api_key", "false")
        assert ALICE not in file.read_text()


async def test_names_are_told_and_keys_are_not(nats_server: NatsServer, tmp_path: Path) -> None:
    async with with_keys(nats_server, tmp_path, entries(alice=1), api_keys="a-plain-key-of-old", log_level="DEBUG") as (
        stack,
        _,
    ):
        tasks = await unfinished(stack, ALICE, 1)
        assert (await ask(stack, ALICE)).status_code == 429
        await end(*tasks)
        assert (await ask(stack, "a-plain-key-of-old")).status_code == 200
        assert (await ask(stack, "fb-somebody-elses-key")).status_code == 401
        text = (await stack.http.get(f"{stack.apis[0].url}/metrics")).text
        found = counted(text, "forebay_key_requests_total")
        assert found == {
            ("alice", "admitted"): 1,
            ("alice", "refused"): 1,
            ("key-1", "admitted"): 1,
        }
        assert counted(text, "forebay_requests_rejected_total")[("key_limit_reached",)] == 1
        logs = [await service.whole_log() for service in (stack.apis[0], stack.workers[0])]
        lines = [json.loads(line) for line in logs[0]]
        assert {line["key"] for line in lines if "received" in line["message"]} == {"alice", "key-1"}
        assert [line["key"] for line in lines if line.get("code") == "rate_limit_exceeded"] == ["alice"]
        seen = "\n".join([*logs[0], *logs[1], text])
        for secret in (ALICE, BOB, OPS, "a-plain-key-of-old", "fb-somebody-elses-key", keys.digest(ALICE.encode())):
            assert secret not in seen


async def test_only_what_the_queue_took_counts_as_admitted(nats_server: NatsServer, tmp_path: Path) -> None:
    async with with_keys(nats_server, tmp_path, entries(), max_queue_size=1, max_concurrent_requests=1) as (stack, _):
        tasks = await unfinished(stack, ALICE, 1)
        for key in (ALICE, BOB):
            assert summary(await ask(stack, key))[::2] == (503, "queue_full")
        text = (await stack.http.get(f"{stack.apis[0].url}/metrics")).text
        assert counted(text, "forebay_key_requests_total") == {("alice", "admitted"): 1}
        await end(*tasks)


async def test_one_key_cannot_take_the_whole_queue(nats_server: NatsServer, tmp_path: Path) -> None:
    async with with_keys(nats_server, tmp_path, entries(alice=2), max_queue_size=10) as (stack, _):
        tasks = await unfinished(stack, ALICE, 2)
        refused = await ask(stack, ALICE)
        assert summary(refused) == (429, "requests", "rate_limit_exceeded", None)
        assert error_of(refused)["message"].startswith("Your key `alice` has 2 requests in the queue")
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        with pytest.raises(openai.RateLimitError) as caught:
            await stack.openai(api_key=ALICE).chat.completions.create(model=MODEL, messages=user("hi"), stream=True)
        assert caught.value.code == "rate_limit_exceeded"
        # Nor by way of an Idempotency-Key, whose request goes on without its client.
        assert (await ask(stack, ALICE, **{"idempotency-key": "once"})).status_code == 429
        # Others have no part in it, and a place is free again when a request has ended, however it did.
        others = await unfinished(stack, BOB, 3)
        await end(*tasks[:1])
        await until(stack, ALICE, 200)
        tasks += await unfinished(stack, ALICE, 1)
        await end(*tasks, *others)
        await until(stack, ALICE, 200)


async def test_the_bound_holds_over_all_apis(nats_server: NatsServer, tmp_path: Path) -> None:
    async with with_keys(nats_server, tmp_path, entries(), apis=2, key_max_requests=2) as (stack, _):
        tasks = await unfinished(stack, ALICE, 2, api=0)
        # The other api learns it by the next heartbeat, within a second.
        await until(stack, ALICE, 429, api=1)
        await end(*tasks)
        await until(stack, ALICE, 200, api=1)
        await stack.beats(stack.apis[1])  # it has nothing unfinished, as the other one hears too
        # An api that dies takes its count along.
        tasks = await unfinished(stack, ALICE, 2, api=0)
        await until(stack, ALICE, 429, api=1)
        await stack.apis[0].kill()
        await until(stack, ALICE, 200, api=1)
        await end(*tasks)


async def test_keys_are_changed_without_a_restart(nats_server: NatsServer, tmp_path: Path) -> None:
    async with with_keys(nats_server, tmp_path, entries()) as (stack, file):
        new = keys.make()
        both = f'[alice]\nsha256 = ["{keys.digest(ALICE.encode())}", "{keys.digest(new.encode())}"]\n'
        tasks = await unfinished(stack, ALICE, 1)
        replace(file, both)
        await until(stack, BOB, 401)
        # Both keys of a name are one client.
        for key in (ALICE, new):
            found = await stack.http.get(f"{stack.apis[0].url}/v1/models", headers=bearer(key))
            assert found.status_code == 200
        await end(*tasks)
        # What cannot be meant leaves the keys of before, and is said once.
        replace(file, f'[alice]\nsha256 = "{ALICE}"\n')
        await stack.apis[0].logged(r"ERROR.*\[alice\] sha256: 64 hexadecimal digits.*the keys of before stay")
        assert (await ask(stack, new)).status_code == 200
        file.unlink()
        await stack.apis[0].logged("cannot be read: No such file or directory; the keys of before stay")
        replace(file, keys.written("bob", BOB, max_requests=None, operator=False))
        await until(stack, BOB, 200)
        assert (await ask(stack, new)).status_code == 401
        assert ALICE not in "\n".join(await stack.apis[0].whole_log())


def replace(file: Path, text: str) -> None:
    """Swap the file as a mounted Secret is swapped: never half written."""
    fresh = file.with_suffix(".new")
    fresh.write_text(text)
    fresh.rename(file)


async def test_each_key_sees_its_own_requests(nats_server: NatsServer, tmp_path: Path) -> None:
    async with with_keys(nats_server, tmp_path, entries()) as (stack, _):
        url = stack.apis[0].url
        done = (await ask(stack, ALICE)).headers["x-request-id"]
        await stack.reaches(done, RequestStatus.COMPLETED)
        tasks = await unfinished(stack, ALICE, 1)
        listed = {key: await told(stack, key, count) for key, count in ((ALICE, 2), (BOB, 0), (OPS, 2))}
        assert {len(listed[ALICE]), len(listed[OPS])} == {2}
        assert {state["key"] for state in listed[OPS]} == {"alice"}
        assert listed[BOB] == []
        running_id = next(state["id"] for state in listed[ALICE] if state["status"] == "processing")
        for request_id in (done, running_id):
            for method in ("GET", "DELETE"):
                answer = await stack.http.request(method, f"{url}/v1/queue/request/{request_id}", headers=bearer(BOB))
                assert summary(answer) == (404, "invalid_request_error", "request_not_found", None)
        assert not tasks[0].done()
        for key in (ALICE, OPS):
            answer = await stack.http.get(f"{url}/v1/queue/request/{done}", headers=bearer(key))
            assert answer.json()["status"] == "completed"
        answer = await stack.http.delete(f"{url}/v1/queue/request/{running_id}", headers=bearer(ALICE))
        assert answer.json()["cancelled"] is True
        assert (await tasks[0]).status_code == 499
        again = await unfinished(stack, BOB, 1)
        (other,) = [state["id"] for state in await told(stack, BOB, 1)]
        answer = await stack.http.delete(f"{url}/v1/queue/request/{other}", headers=bearer(OPS))
        assert answer.json()["cancelled"] is True
        await again[0]
        # The numbers are everybody's.
        status = await stack.http.get(f"{url}/v1/queue/status", headers=bearer(BOB))
        assert status.json()["total_queued"] == 3


async def test_what_went_wrong_inside_is_told_to_operators_alone(nats_server: NatsServer, tmp_path: Path) -> None:
    async with with_keys(nats_server, tmp_path, entries(), max_deliveries=1) as (stack, _):
        failed = (await ask(stack, ALICE, "[[fail]]")).headers["x-request-id"]
        await stack.reaches(failed, RequestStatus.FAILED)
        url = f"{stack.apis[0].url}/v1/queue/request/{failed}"
        of_hers, of_operators = [(await stack.http.get(url, headers=bearer(key))).json() for key in (ALICE, OPS)]
        assert of_hers == of_operators | {"fault": None}
        assert of_hers["error"] == "the generation failed"
        worker = stack.workers[0].id
        assert of_operators["fault"] == f"attempt 1 on worker {worker}: the simulated engine was ordered to fail"


async def told(stack: Stack, key: str, count: int) -> list[dict[str, Any]]:
    """The requests that a listener with this key is told of, once there are `count`: the api may hear of one later."""
    found: dict[str, dict[str, Any]] = {}
    async with stack.http.stream("GET", f"{stack.apis[0].url}/v1/queue/events", headers=bearer(key)) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                found |= {state["id"]: state for state in json.loads(line.removeprefix("data: "))["requests"]}
                if len(found) >= count:
                    return list(found.values())
    raise AssertionError("the feed ended")


async def test_a_file_that_cannot_be_meant_ends_the_start(nats_server: NatsServer, tmp_path: Path) -> None:
    stack = Stack(nats_server)
    for name, text, settings, sentence in [
        ("empty", "", {}, "it holds no key"),
        (
            "clash",
            entries().replace("[bob]", "[key-1]"),
            {"api_keys": "x" * 16},
            r"\[key-1\] is what a key of API_KEYS",
        ),
        ("missing", None, {}, "cannot be read: No such file or directory"),
    ]:
        file = tmp_path / f"{name}.toml"
        if text is not None:
            file.write_text(text)
        with pytest.raises(AssertionError, match=sentence):
            await stack.api(api_keys_file=file, **settings)
        assert await stack.apis[-1].ended() == 2


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "it holds no key"),
        ("alice = 1", r"\[alice\]: Input should be a valid dictionary"),
        ("[alice]", r"\[alice\] sha256: Field required"),
        ('[alice]\nsha256 = "abc"', r"\[alice\] sha256: 64 hexadecimal digits"),
        (f'[Alice]\nsha256 = "{"0" * 64}"', r"\[Alice\] is no name"),
        (f'[a]\nsha256 = "{"0" * 64}"\n[b]\nsha256 = "{"0" * 64}"', r"\[a\] and \[b\] have the same key"),
        (f'[a]\nsha256 = "{"0" * 64}"\nmax_requests = 0', r"\[a\] max_requests: Input should be greater than"),
        (f'[a]\nsha256 = "{"0" * 64}"\nadmin = true', r"\[a\] admin: Extra inputs are not permitted"),
        ("a = " + "9" * 5000, "not TOML: "),
        ("a = " + "[" * 5000, "not TOML: "),
        ("\n".join(f'[k{n}]\nsha256 = "{n:064x}"' for n in range(1001)), "it holds more than 1000 names"),
    ],
)
def test_what_the_file_may_not_hold(text: str, sentence: str) -> None:
    with pytest.raises(ConfigurationError, match=sentence):
        keys.parse(text)


async def test_a_file_that_is_too_large_is_not_read_whole(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text("#" * keys.MAX_FILE_BYTES + "é")
    with pytest.raises(ConfigurationError, match=f"larger than {keys.MAX_FILE_BYTES} bytes"):
        async with ApiKeys(ApiSettings(api_keys_file=file, _env_file=None)).followed():
            pass


def test_the_command_makes_a_key_and_its_entry() -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "forebay_cli", "key", *arguments], capture_output=True, text=True, check=False
        )

    asked = {"max_requests": 5, "tokens_per_minute": 6, "tokens_per_day": 7, "weight": 2.5}
    options = [f"--{field.replace('_', '-')}={value}" for field, value in asked.items()]
    made = run("alice", *options, "--tier=flex", "--tier=default", "--operator")
    assert made.returncode == 0, made.stderr
    # The entry goes to stdout, so that `>> keys.toml` takes it and nothing else; the key is shown this once.
    (key,) = (word for word in made.stderr.split() if word.startswith(keys.PREFIX))
    entry = keys.parse(made.stdout)["alice"]
    tiers = ("flex", "default")
    assert entry == keys.KeyEntry(sha256=(keys.digest(key.encode()),), tiers=tiers, operator=True, **asked)  # type: ignore[arg-type]
    assert set(asked) | {"sha256", "tiers", "operator"} == set(keys.KeyEntry.model_fields)
    assert len(key) >= 43
    assert run("alice").stdout != run("alice").stdout
    for wrong in (["Alice B"], ["alice", "--tier=gold"]):
        refused = run(*wrong)
        assert (refused.returncode, refused.stdout) == (2, "")
