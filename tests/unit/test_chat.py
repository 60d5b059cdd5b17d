"""What a person types in `forebay chat`, and sees while the answer waits."""

import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from forebay_cli import prompt, queue_place
from forebay_cli.commands import chat

UP = "\x1b[A"
REQUEST = httpx.Response(200, headers={"x-request-id": "abc"})


def test_pasted_lines_are_one_message_and_earlier_ones_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = SimpleNamespace(isatty=lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal)
    monkeypatch.setattr(sys, "stdout", terminal)
    history = tmp_path / "new" / "chat_history"
    with create_pipe_input() as typed, create_app_session(input=typed, output=DummyOutput()):
        read = prompt.reader(history)
        typed.send_text("\x1b[200~two\n\nlines\x1b[201~ and more\r")
        assert read() == "two\n\nlines and more"
        typed.send_text(f"{UP}\x1b[D\x7fr!\r")  # one to the left, one away
        assert read() == "two\n\nlines and mor!e"
        typed.send_text("\x04")
        with pytest.raises(EOFError):
            read()
        typed.send_text(f"{UP}\r")
        assert prompt.reader(history)() == "two\n\nlines and mor!e"
    assert history.stat().st_mode & 0o777 == 0o600


def test_the_place_in_the_queue_is_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(queue_place, "LOOK_AFTER_S", 0.001)
    answers = [
        {"status": "queued", "position": 2, "estimated_wait_s": None},
        {"status": "queued", "position": 1, "estimated_wait_s": 3.2},
        {"status": "queued", "position": None},
    ]
    enough = threading.Event()

    def answer(request: httpx.Request) -> httpx.Response:
        assert request.url.path == "/v1/queue/request/abc"
        if not answers:
            enough.set()
            return httpx.Response(404)
        return httpx.Response(200, json=answers.pop(0))

    with (
        httpx.Client(base_url="http://api/v1/", transport=httpx.MockTransport(answer)) as client,
        queue_place.shown(client, REQUEST) as arrived,
    ):
        assert enough.wait(10)
        arrived()
    assert capsys.readouterr().err.splitlines() == [
        "waiting: place 2 in the queue",
        "waiting: place 1 in the queue, about 3 s",
        "waiting in the queue",
    ]


def test_a_model_that_has_a_worker_is_asked() -> None:
    models = [{"id": "default", "status": "no_worker"}, {"id": "served", "status": "ready"}]
    answers = httpx.MockTransport(lambda _: httpx.Response(200, json={"data": models}))
    with httpx.Client(base_url="http://api/v1/", transport=answers) as client:
        assert chat._first_model(client) == "served"
        del models[1:]
        assert chat._first_model(client) == "default"
