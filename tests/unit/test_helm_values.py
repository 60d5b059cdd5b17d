"""`forebay plan --helm-values`: an entry of the chart's `models`. tests/kubernetes renders the chart with it."""

from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from forebay_cli.commands.plan import fit_all, options_of, settings_of
from forebay_cli.helm_values import helm_values
from forebay_cli.main import app
from forebay_contracts.sizing.gpu_memory import recommended
from forebay_contracts.sizing.model_shape import of_params


def values(name: str, engine: str = "transformers") -> tuple[str, dict[str, Any]]:
    """The key and the entry for 7.6 billion parameters in 24 GiB."""
    shape = of_params(name, 7_600_000_000, 28, 4, 128)
    best = recommended(fit_all(shape, 24 << 30, 8192, None, requests_per_slot=50, engine=engine, flash=False), 4, 8192)
    assert best is not None
    found = yaml.safe_load(helm_values(shape, best, settings_of(best, engine), options_of(best, engine), 300.0))
    assert found["requestTimeout"] == 300
    ((key, entry),) = found["models"].items()
    return key, entry


def test_an_entry_has_the_numbers_of_one_worker() -> None:
    key, entry = values("Qwen/Qwen2.5-7B-Instruct")
    assert key == "qwen2-5-7b-instruct"
    assert entry == {
        "model": "Qwen/Qwen2.5-7B-Instruct",
        "gpus": 1,
        "slots": 12,
        "queue": 600,
        "memoryGiB": 16,
        "settings": {"MODEL_QUANTIZATION": "none", "LLM_BATCH_SIZE": "512"},
    }


@pytest.mark.parametrize(
    ("name", "engine", "model"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", "vllm", "Qwen/Qwen2.5-7B-Instruct"),
        ("Qwen/Qwen2.5-7B-Instruct", "llamacpp", ""),  # which file?
        ("7.6B", "sglang", ""),
        ("/home/me/qwen", "vllm", ""),
    ],
)
def test_a_servers_slots_are_the_charts_to_give(name: str, engine: str, model: str) -> None:
    _, entry = values(name, engine)
    assert (entry["engine"], entry["model"]) == (engine, model)
    assert entry["engineOptions"].startswith("--")
    assert not {"--max-num-seqs", "--max-running-requests", "--parallel"} & set(entry["engineOptions"].split())
    assert "GGUF" not in entry["engineOptions"]


@pytest.mark.parametrize(
    ("name", "key"), [("org/123", "123"), ("org/true", "true"), ("org/1e3", "1e3"), ("org/Größe_2.5", "gr-e-2-5")]
)
def test_the_key_is_a_text(name: str, key: str) -> None:
    assert values(name)[0] == key


def test_two_files_of_a_long_name_have_two_keys() -> None:
    files = [f"org/repo/DeepSeek-R1-Distill-Qwen-14B-Instruct-abliterated-{kind}.gguf" for kind in ("Q4_K_M", "Q8_0")]
    keys = {values(file, "llamacpp")[0] for file in files}
    assert len(keys) == 2
    assert all(len(key) <= 40 for key in keys)


def test_what_does_not_fit_gives_no_values() -> None:
    result = CliRunner().invoke(app, ["plan", "--gpu-memory", "1GiB", "--model", "7.6B", "--helm-values"])
    assert result.stdout == ""
    assert result.exit_code != 0
