"""`forebay up --engine llamacpp`: an answer of the whole system, and the end when the inference server is killed."""

from pathlib import Path

import pytest

from support.command import up
from support.gguf import write_tiny_gguf
from support.served import SERVER
from support.stack import MODEL, data_dir

pytestmark = [pytest.mark.timeout(180), pytest.mark.usefixtures("usual_port_is_taken")]


async def test_up_answers_and_names_a_server_that_was_killed(tmp_path: Path) -> None:
    model = write_tiny_gguf(tmp_path / "tiny.gguf")
    settings = {"default_model": model, "model_name": MODEL, "max_concurrent_requests": 2, "engine_command": SERVER}
    async with up(tmp_path, "--engine", "llamacpp", **settings) as running:
        answer = (await running.chat("hi", max_tokens=5, temperature=0)).json()
        assert answer["usage"]["completion_tokens"] == 5
        refused = await running.chat("hi", presence_penalty=1)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "presence_penalty"
        # The process that guards the server's group has the command of the server at its end.
        (server,) = [one for one in running.children("llama_server") if one.cmdline()[2].endswith(".llama_server")]
        server.kill()
        ended = await running.ended()
    assert ended.code == 1
    assert "worker 1 ended with exit code 1" in ended.stderr
    assert "the engine broke: llama.cpp ended with signal SIGKILL" in ended.stderr


@pytest.mark.model
async def test_the_default_model_is_served_without_a_conversion(tmp_path: Path) -> None:
    (tmp_path / "models").symlink_to(data_dir() / "models")
    async with up(tmp_path, "--engine", "llamacpp", engine_command=SERVER) as running:
        answer = (await running.chat("What is the capital of France?", max_tokens=16, temperature=0)).json()
    # At its first token, `L` and `The` are 0.2 nats apart, so what it says depends on the processor.
    assert answer["usage"]["prompt_tokens"] == 37
    assert len(answer["choices"][0]["message"]["content"].split()) > 3
