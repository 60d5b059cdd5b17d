"""deploy/nginx/forebay.conf in a real nginx, before two apis."""

import json
import re
import shutil
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import openai
import pytest
import pytest_asyncio
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from forebay_contracts.settings import ApiSettings
from forebay_contracts.wire.state import RequestStatus
from support.manifests import DEPLOY
from support.nats import NatsServer
from support.ports import port_of
from support.stack import MODEL, Stack, running

pytestmark = [pytest.mark.deploy, pytest.mark.asyncio(loop_scope="module")]

CONF = DEPLOY.parent / "nginx" / "forebay.conf"
START_TIMEOUT_S = 10


class Nginx:
    """One nginx with the site alone, before the apis of a stack."""

    def __init__(self, folder: Path, apis: list[str]) -> None:
        init = DEPLOY.parent / "nats" / "init.py"  # a certificate for localhost, and its authority
        subprocess.run([sys.executable, init, folder / "tls"], check=True, capture_output=True)
        self.ports = {443: port_of(self), 80: port_of(self)}
        text = CONF.read_text().replace("/etc/nginx/tls/llm.example.pem", str(folder / "tls" / "server.pem"))
        text = text.replace("/etc/nginx/tls/llm.example.key", str(folder / "tls" / "server.key"))
        text = text.replace("server_name llm.example", "server_name localhost")
        text = re.sub(r"listen \[::\].*", "", text)  # no machine of a test needs IPv6
        for number, port in self.ports.items():
            text = text.replace(f"listen {number}", f"listen 127.0.0.1:{port}")
        for port, api in zip((8091, 8092), apis, strict=True):
            text = text.replace(f"127.0.0.1:{port}", api.removeprefix("http://"))
        paths = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        temporary = "".join(f"{name}_temp_path {folder}/{name};\n" for name in paths)
        main = f"daemon off; pid {folder}/pid; error_log {folder}/error.log; events {{}}\n"
        (folder / "nginx.conf").write_text(f"{main}http {{ access_log off; {temporary} {text} }}\n")
        self._command = [shutil.which("nginx") or "/usr/sbin/nginx", "-p", folder, "-c", folder / "nginx.conf"]
        self._log = folder / "error.log"
        self.tls = ssl.create_default_context(cafile=folder / "tls" / "ca.pem")
        self.url = f"https://localhost:{self.ports[443]}"

    async def start(self) -> "Nginx":
        checked = subprocess.run(  # noqa: ASYNC221
            [*self._command, "-t"], capture_output=True, text=True, check=False
        )
        assert checked.returncode == 0, checked.stderr
        self._process = subprocess.Popen(self._command)  # noqa: ASYNC220
        give_up_at = time.monotonic() + START_TIMEOUT_S
        async with httpx.AsyncClient(verify=self.tls) as http:
            while time.monotonic() < give_up_at:
                try:
                    assert (await http.get(self.url + "/health/ready")).status_code == 200
                    return self
                except httpx.ConnectError:
                    assert self._process.poll() is None, self._log.read_text()
        raise AssertionError(self._log.read_text())

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(START_TIMEOUT_S)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(module_nats: NatsServer) -> AsyncIterator[Stack]:
    async with running(module_nats, apis=2, api_keys="key", max_concurrent_requests=4) as started:
        yield started


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def nginx(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Nginx]:
    started = await Nginx(tmp_path_factory.mktemp("nginx"), [api.url for api in stack.apis]).start()
    yield started
    started.stop()


@pytest_asyncio.fixture(loop_scope="module")
async def client(nginx: Nginx) -> AsyncIterator[openai.AsyncOpenAI]:
    http = httpx.AsyncClient(verify=nginx.tls, http1=True)
    async with openai.AsyncOpenAI(base_url=nginx.url + "/v1", api_key="key", max_retries=0, http_client=http) as made:
        yield made


async def begun(
    client: openai.AsyncOpenAI, orders: str
) -> tuple[str, openai.AsyncStream[openai.types.chat.ChatCompletionChunk]]:
    """A stream of which a token has come, and the id of its request."""
    messages: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": f"[[{orders}]]"}]
    stream = await client.chat.completions.create(model=MODEL, messages=messages, stream=True)
    async for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            return stream.response.headers["x-request-id"], stream
    raise AssertionError("no token came")


async def test_tokens_arrive_while_the_model_runs(stack: Stack, client: openai.AsyncOpenAI) -> None:
    request_id, stream = await begun(client, "tokens=4 delay_ms=500")
    state = await stack.state(request_id)
    assert state is not None
    assert state.status is RequestStatus.PROCESSING
    assert [chunk async for chunk in stream]
    await stack.reaches(request_id, RequestStatus.COMPLETED)


async def test_a_client_that_leaves_cancels_its_request(stack: Stack, client: openai.AsyncOpenAI) -> None:
    request_id, stream = await begun(client, "tokens=400 delay_ms=100")
    await stream.close()
    await stack.reaches(request_id, RequestStatus.CANCELLED)


async def test_files_larger_than_a_request_are_taken(client: openai.AsyncOpenAI) -> None:
    content = b'{"a": 1}\n' * 550_000
    file = await client.files.create(file=("in.jsonl", content), purpose="batch")
    assert (await client.files.content(file.id)).content == content


async def test_errors_are_the_apis_own(client: openai.AsyncOpenAI, nginx: Nginx) -> None:
    with pytest.raises(openai.AuthenticationError) as refused:
        await client.with_options(api_key="wrong").models.list()
    assert refused.value.code == "invalid_api_key"
    async with httpx.AsyncClient() as http:
        answer = await http.get(f"http://localhost:{nginx.ports[80]}/v1/models", headers={"Host": "evil.example"})
    assert (answer.status_code, answer.headers["location"]) == (308, "https://localhost/v1/models")
    async with httpx.AsyncClient(verify=nginx.tls) as http:
        assert (await http.get(nginx.url + "/metrics")).status_code == 404


async def test_a_websocket_passes_with_its_key(nginx: Nginx) -> None:
    url, asked = nginx.url.replace("https", "wss") + "/v1/responses", {"type": "response.create", "model": MODEL}
    with pytest.raises(InvalidStatus, match="401"):
        await connect(url, ssl=nginx.tls)
    async with connect(url, ssl=nginx.tls, additional_headers={"Authorization": "Bearer key"}) as socket:
        await socket.send(json.dumps(asked | {"input": "[[tokens=2]]"}))
        kinds = [json.loads(await socket.recv())["type"]]
        while kinds[-1] != "response.completed":
            kinds.append(json.loads(await socket.recv())["type"])
    assert kinds[0] == "response.created"


async def test_the_proxy_outwaits_every_request() -> None:
    text = CONF.read_text()
    for name in ("proxy_read_timeout", "proxy_send_timeout"):
        (seconds,) = re.findall(rf"{name} (\d+)s;", text)
        assert int(seconds) > ApiSettings.model_fields["request_timeout"].default
    (megabytes,) = re.findall(r"client_max_body_size (\d+)m;", text)
    assert int(megabytes) * 2**20 > ApiSettings.model_fields["max_file_bytes"].default


async def test_the_other_api_answers_when_one_is_killed(stack: Stack, client: openai.AsyncOpenAI) -> None:
    await stack.apis.pop().kill()
    for _ in range(4):
        _, stream = await begun(client, "tokens=2")
        assert [chunk async for chunk in stream]
