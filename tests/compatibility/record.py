"""Record the messages of the present schema, as they pass by in a running system: `record.py FOLDER`.

To be run once for each schema version, by the last release that writes it; what it wrote is never changed again.
"""

import asyncio
import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from nats.aio.msg import Msg

from support.nats import NatsServer, flushed
from support.stack import MODEL, Stack, running

KINDS = {
    "inference.requests.": "requests",
    "inference.replies.": "frames",
    "$KV.inference-requests.": "states",
    "$KV.inference-workers.": "workers",
    "$KV.inference-apis.": "apis",
    "_INBOX.": "resumes",
}


def main(folder: Path) -> None:
    """One file a kind of message, each a JSON array in the order in which they were heard."""
    with tempfile.TemporaryDirectory() as store:
        server = NatsServer(Path(store))
        server.start()
        try:
            heard = asyncio.run(_record(server))
        finally:
            server.stop()
    folder.mkdir(parents=True)
    for kind, messages in heard.items():
        (folder / f"{kind}.json").write_text(json.dumps(messages, indent=1, ensure_ascii=False) + "\n")


async def _record(server: NatsServer) -> dict[str, list[object]]:
    heard: dict[str, list[object]] = defaultdict(list)

    async def hear(msg: Msg) -> None:
        for prefix, kind in KINDS.items():
            if msg.subject.startswith(prefix) and msg.data:
                body = json.loads(msg.data)
                # Inboxes carry the server's answers too.
                if kind != "resumes" or body.keys() <= {"wanted", "outcome", "choices"}:
                    heard[kind].append(body)

    async with running(server, request_timeout=2, max_deliveries=2) as stack:
        for subject in ("inference.>", "$KV.>", "_INBOX.>"):
            await stack.connection.client.subscribe(subject, cb=hear)
        await _ask(stack)
        await flushed(stack.connection.client)
    return {kind: _distinct(kind, messages) for kind, messages in heard.items()}


async def _ask(stack: Stack) -> None:
    url = stack.apis[0].url
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "[[tokens=3]]"}]}
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    for path, body in (
        ("chat/completions", chat | {"n": 2, "stream": True, "seed": 7, "stop": ["t9"], "logit_bias": {"5": -1}}),
        ("chat/completions", chat | {"tools": [tool], "tool_choice": "auto", "logprobs": True, "top_logprobs": 1}),
        ("chat/completions", chat | {"response_format": {"type": "json_object"}, "temperature": 0, "top_p": 0.5}),
        ("completions", {"model": MODEL, "prompt": ["[[tokens=2]]", "[[tokens=1]]"], "max_tokens": 4, "logprobs": 1}),
        ("embeddings", {"model": MODEL, "input": ["a", "b"], "dimensions": 4}),
        ("chat/completions", {"model": MODEL, "messages": [{"role": "user", "content": "[[tokens=2 fail]]"}]}),
        ("chat/completions", {"model": MODEL, "messages": [{"role": "user", "content": "[[delay_ms=60000]]"}]}),
    ):
        print(path, (await stack.http.post(f"{url}/v1/{path}", json=body)).status_code)
    await stack.http.post(f"{url}/v1/chat/completions", json=chat, headers={"idempotency-key": "once"})
    await stack.idle()


def _distinct(kind: str, messages: list[object]) -> list[object]:
    """Heartbeats repeat themselves, and a request is heard when it comes and when it is handed out."""
    return messages[:1] if kind in ("workers", "apis") else [m for n, m in enumerate(messages) if m not in messages[:n]]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
