"""The command where a terminal, a file or a folder is not as usual: one sentence, and never a traceback."""

import json
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from support.command import environment

FOREBAY = f"exec {sys.executable} -m forebay_cli"
CONFIG = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
CONFIG |= {"vocab_size": 1000, "max_position_embeddings": 512}


def shell(folder: Path, command: str, given: bytes = b"", **settings: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `command`, where FOREBAY is our command."""
    env = environment(folder / "data", **settings)
    script = command.replace("FOREBAY", FOREBAY)
    ended = subprocess.run(
        ["sh", "-c", script], input=given, capture_output=True, env=env, cwd=folder, timeout=60, check=False
    )
    return ended.returncode, ended.stdout.decode(), ended.stderr.decode()


def test_a_terminal_that_speaks_ascii(tmp_path: Path) -> None:
    model = tmp_path / "modèle-é→"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(CONFIG))
    code, printed, error = shell(tmp_path, f"FOREBAY plan --gpu-memory 24GiB --model {model}", pythonioencoding="ascii")
    assert (code, error) == (0, "")
    assert "mod\\xe8le-\\xe9\\u2192" in printed
    code, printed, error = shell(
        tmp_path, f"FOREBAY plan --gpu-memory 24GiB --model {model} --json", pythonioencoding="ascii"
    )
    assert (code, error, printed.isascii()) == (0, "", True)
    assert json.loads(printed)["model"]["name"].endswith("modèle-é→")


@pytest.mark.parametrize(
    ("redirections", "code", "entry", "key"),
    [
        ("<&- >&- 2>&-", 0, False, False),
        ("2>/dev/full", 0, True, False),
        (">/dev/full", 1, False, True),
    ],
)
def test_streams_that_are_closed_or_full(tmp_path: Path, redirections: str, code: int, entry: bool, key: bool) -> None:
    ended, printed, error = shell(tmp_path, f"FOREBAY key alice {redirections}")
    assert (ended, "[alice]" in printed, "the key of alice" in error) == (code, entry, key)
    fault = ["forebay: input or output: no space left on device"] if code else []
    assert error.splitlines()[1:] == fault


@pytest.mark.parametrize("stream", [1, 2])
def test_nobody_reads_any_more(tmp_path: Path, stream: int) -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    pipes[("stdout", "stderr")[stream - 1]] = ours
    command = [sys.executable, "-m", "forebay_cli", "key", "alice"]
    ended = subprocess.run(command, env=environment(tmp_path), timeout=60, check=False, **pipes)
    ours.close()
    if stream == 1:
        assert (ended.returncode, ended.stderr.count(b"\n")) == (1, 1)
    else:
        assert (ended.returncode, ended.stdout[:7]) == (0, b"[alice]")


class OneModel(BaseHTTPRequestHandler):
    """An api that serves one model and refuses each chat."""

    heard: list[Any]

    def do_GET(self) -> None:
        self._answer(200, {"data": [{"id": "m"}]})

    def do_POST(self) -> None:
        self.heard.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self._answer(503, {"error": {"message": "no room →", "code": "queue_full"}})

    def _answer(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


def test_a_conversation_with_what_stdin_gives(tmp_path: Path) -> None:
    OneModel.heard = []
    with HTTPServer(("127.0.0.1", 0), OneModel) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            talk = f"FOREBAY chat --base-url http://127.0.0.1:{server.server_port}/v1"
            code, _, error = shell(tmp_path, talk + " <&-")
            assert (code, error.count("\n")) == (0, 2), error  # the server, and how to talk
            code, _, error = shell(tmp_path, talk, b"caf\xe9 \xff\n", pythonioencoding="ascii")
            assert code == 0
            assert "forebay: queue_full: no room \\u2192 (HTTP 503; request unknown)\n" in error
            assert "Traceback" not in error
        finally:
            server.shutdown()
    (body,) = OneModel.heard
    assert body["messages"] == [{"role": "user", "content": "caf\ufffd \ufffd"}]


def test_arguments_and_files_that_are_no_text(tmp_path: Path) -> None:
    code, _, error = shell(tmp_path, "FOREBAY chat --model m --base-url http://127.0.0.1:9/v1 $(printf '\\377')")
    assert (code, error.count("\n")) == (1, 2)
    assert "\nforebay: this is no text in UTF-8: " in error
    (tmp_path / ".env").write_bytes("MAX_QUEUE_SIZE=7\n".encode("utf-16"))
    for command in ("status", "fetch"):
        code, _, error = shell(tmp_path, f"FOREBAY {command}")
        assert (code, error.count("\n")) == (2, 1)
        assert f"{tmp_path}/.env is no text in UTF-8 (invalid start byte): save it as UTF-8" in error


def test_a_data_dir_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "nats").touch()
    code, _, error = shell(tmp_path, "FOREBAY up --engine simulated --port 0")
    assert (code, error) == (2, f"forebay: DATA_DIR={tmp_path}/data cannot be used: Not a directory\n")
