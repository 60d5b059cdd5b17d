"""Which files of a hub's repository are fetched, and what is said when they cannot be."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants

from forebay_contracts.settings import InferenceSettings
from forebay_contracts.wire.errors import ConfigurationError
from forebay_inference.fetch import fetch as fetched_by_the_command
from forebay_inference.models.adapters import ensure_adapters
from forebay_inference.models.hub import checkpoint_files, download_from_hub, files_beside_weights
from forebay_inference.models.store import ensure_gguf
from support.hub import Hub
from support.ports import port_of

TEXTS = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
OTHERS = ["README.md", "flax_model.msgpack", "tf_model.h5", "onnx/model.onnx", "onnx/config.json", "m.Q4_K_M.gguf"]
OTHERS += ["original/consolidated.00.pth", "original/params.json", "original/model.safetensors", "training_args.bin"]
OTHERS += ["consolidated.safetensors", "consolidated.safetensors.index.json", "model.fp16.safetensors", "a/b.json"]
OTHERS += ["openvino/openvino_model.xml", "coreml/config.json", "model-00001-of-00009.safetensors", "optimizer.bin"]
INDEX = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}})


@pytest.mark.parametrize(
    ("there", "wanted"),
    [
        (["model.safetensors", "pytorch_model.bin"], ["model.safetensors"]),
        (["pytorch_model.bin"], ["pytorch_model.bin"]),
        (
            ["model.safetensors.index.json", "model-1.safetensors", "model-2.safetensors", "model-3.safetensors"],
            ["model.safetensors.index.json", "model-1.safetensors", "model-2.safetensors"],
        ),
        (["modules.json", "0_Transformer/model.safetensors", "1_Pooling/config.json", "2_Dense/pytorch_model.bin"],)
        * 2,
        (["model.safetensors", "additional_chat_templates/tools.jinja"],) * 2,
    ],
)
def test_the_checkpoint_alone_is_fetched(there: list[str], wanted: list[str]) -> None:
    assert checkpoint_files({*TEXTS, *OTHERS, *there}, lambda _: INDEX) == sorted([*TEXTS, *wanted])


def test_a_repository_without_weights_has_no_checkpoint() -> None:
    assert checkpoint_files({*TEXTS, *OTHERS}, lambda _: INDEX) == []
    assert checkpoint_files({"model.safetensors"}, lambda _: INDEX) == []


def test_beside_a_server_that_has_the_weights_none_is_fetched() -> None:
    there = {*TEXTS, *OTHERS, "model.safetensors", "additional_chat_templates/tools.jinja", "1_Pooling/config.json"}
    found = files_beside_weights(there, lambda _: INDEX)
    assert found == sorted([*TEXTS, "additional_chat_templates/tools.jinja"])
    # What ends an answer may be said in the file that is missing here, or it was never there.
    there.remove("generation_config.json")
    assert files_beside_weights(there, lambda _: INDEX) == checkpoint_files(there, lambda _: INDEX)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    made = Hub()
    files = dict.fromkeys(("README.md", "original/model.safetensors", "consolidated.safetensors"), b"not wanted")
    made.repositories["org/model"] = files | {name: name.encode() for name in ("config.json", "tokenizer.json")}
    made.repositories["org/model"] |= {"model.safetensors.index.json": INDEX.encode()}
    made.repositories["org/model"] |= {f"model-{number}.safetensors": bytes([number]) * 100 for number in (1, 2, 3)}
    with made.running() as url:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + template[template.index("/{repo_id}") :])
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield made


def fetch(folder: Path, model: str = "org/model", token: str | None = None) -> tuple[Path, list[str]]:
    """The folder, and what was said meanwhile."""
    lines: list[str] = []
    return download_from_hub(model, folder, lines.append, token), lines


def refusal(folder: Path, model: str = "org/model", token: str | None = None) -> str:
    with pytest.raises(ConfigurationError) as raised:
        fetch(folder, model, token)
    message = str(raised.value)
    assert message.startswith(f"DEFAULT_MODEL={model}")
    assert "\n" not in message
    return message


def test_a_model_is_fetched_once(hub: Hub, tmp_path: Path) -> None:
    folder, lines = fetch(tmp_path / "hub")
    wanted = ["config.json", "model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json"]
    assert sorted(path.name for path in folder.iterdir()) == [*wanted, "tokenizer.json"]
    assert sorted(hub.fetched) == [*wanted, "tokenizer.json"]
    assert (lines[0], lines[-1]) == ("fetching org/model from the model hub", "fetching org/model: 100 %")
    assert fetch(tmp_path / "hub")[0] == folder
    assert len(hub.fetched) == 5
    assert hub.tokens == {""}


def test_a_hub_that_is_away_is_not_needed_again(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = fetch(tmp_path / "hub")
    hub.status = 503
    found, lines = fetch(tmp_path / "hub")
    assert found == folder
    assert lines[-1] == "the hub answered with status 503; using org/model as an earlier start has fetched it"
    # What another program has fetched into the client's own cache is used, if all of it is there.
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert fetch(tmp_path / "other") == (folder, [])
    (folder / "model-2.safetensors").unlink()
    assert "the hub answered with status 503" in refusal(tmp_path / "other")
    assert "the hub answered with status 503" in refusal(tmp_path / "hub")
    hub.status = None
    assert (fetch(tmp_path / "other")[0] / "model-2.safetensors").is_file()


def test_a_token_opens_gated_and_private_models(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["org/gated"] = hub.repositories["org/private"] = hub.repositories["org/model"]
    hub.gated.add("org/gated")
    hub.private.add("org/private")
    gated = refusal(tmp_path, "org/gated")
    assert f"it is gated: accept its terms at {hub.url}/org/gated, and set HF_TOKEN to a token of that account" in gated
    assert "it is private and HF_TOKEN is not set" in refusal(tmp_path, "org/private")
    assert refusal(tmp_path, "org/private", "hf_wrong").endswith("the hub does not accept HF_TOKEN")
    assert "the hub has no such model" in refusal(tmp_path, "org/nothing", hub.token)
    for model in ("org/gated", "org/private"):
        assert fetch(tmp_path, model, hub.token)[0].is_dir()


def test_what_cannot_be_loaded_is_named(hub: Hub, tmp_path: Path) -> None:
    for name, files, reason in (
        ("gguf", ["m.Q4_K_M.gguf", "config.json"], "download one of its .gguf files, and give its path"),
        ("adapter", ["adapter_config.json", "adapter_model.safetensors"], "it is an adapter and no whole model"),
        ("empty", ["README.md"], "config.json with model.safetensors or pytorch_model.bin"),
    ):
        hub.repositories[f"org/{name}"] = dict.fromkeys(files, b"{}")
        assert reason in refusal(tmp_path, f"org/{name}")
    files = hub.repositories["org/model"]
    hub.repositories["org/shards"] = {name: files[name] for name in files if name != "model-2.safetensors"}
    assert "its index names weights that the hub does not have: model-2" in refusal(tmp_path, "org/shards")
    for index in (b"not json", b"[]", b'{"weight_map": {"a": 1}}'):
        hub.repositories["org/index"] = files | {"model.safetensors.index.json": index}
        assert "model.safetensors.index.json is no index of weights" in refusal(tmp_path / str(len(index)), "org/index")
    assert "neither a local path nor a hub id" in refusal(tmp_path, "no model id")


def test_no_hub_is_one_sentence(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port_of(hub)}")
    assert "cannot be reached" in refusal(tmp_path)
    assert "give a local folder or GGUF file" in refusal(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refusal(tmp_path)


def test_a_full_disk_says_so_before_anything_is_fetched(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=200_000))
    hub.repositories["org/large"] = {"config.json": b"{}", "model.safetensors": bytes(5_300_000)}
    said = f"DEFAULT_MODEL=org/large could not be fetched: {tmp_path}: the disk is full: 5.3 MB are needed, and 0.2"
    assert refusal(tmp_path, "org/large") == f"{said} MB are free"
    assert hub.fetched == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1))
    assert "could not be fetched: not enough free disk space" in refusal(tmp_path)  # for the index of its weights


def test_a_folder_that_cannot_be_written_is_named(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert f"{tmp_path}/file" in refusal(tmp_path / "file")


def test_the_command_takes_the_token_of_its_env_file_and_links_the_model(hub: Hub, tmp_path: Path) -> None:
    hub.private.add("org/model")
    (tmp_path / ".env").write_text(f"HF_TOKEN={hub.token}\nDEFAULT_MODEL=org/model\n")
    env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "DATA_DIR": str(tmp_path / "data")}
    link = tmp_path / "data" / "served"
    command = [sys.executable, "-m", "forebay_cli", "fetch", "--link", str(link)]
    ended = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.splitlines()[-1].startswith(f"org/model is in {tmp_path}/data/hub/")
    assert hub.tokens == {hub.token}
    assert hub.token not in ended.stdout
    (tmp_path / "data").rename(tmp_path / "mounted elsewhere")
    assert (tmp_path / "mounted elsewhere" / "served" / "config.json").read_text() == "config.json"


def test_a_link_that_cannot_be_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").touch()
    monkeypatch.setenv("DEFAULT_MODEL", str(tmp_path))
    for link, reason in ((tmp_path / "none" / "served", "no such file or directory"), (Path("/proc/served"), "")):
        with pytest.raises(ConfigurationError, match=f"^--link {link} cannot be made: {reason}"):
            fetched_by_the_command(link)


def test_the_gguf_file_that_is_named_is_fetched_with_its_parts(hub: Hub, tmp_path: Path) -> None:
    names = ["a-Q4.gguf", "b-00001-of-00002.gguf", "b-00002-of-00002.gguf", "mmproj-a.gguf", "README.md"]
    hub.repositories["org/many"] = {name: name.encode() for name in names}
    hub.repositories["org/one"] = {name: name.encode() for name in ("only.gguf", "mmproj-a.gguf")}
    for model, file in [("org/many/a-Q4.gguf", "a-Q4.gguf"), ("org/one", "only.gguf")]:
        fetched = ensure_gguf(model, tmp_path, lambda line: None)
        assert (fetched.name, fetched.read_bytes()) == (file, file.encode())
    fetched = ensure_gguf("org/many/b-00001-of-00002.gguf", tmp_path, lambda line: None)
    assert (fetched.parent / "b-00002-of-00002.gguf").is_file()
    hub.status = 503
    assert ensure_gguf("org/one", tmp_path, lambda line: None).is_file()


def test_a_gguf_file_that_is_not_named_or_not_there_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["org/many"] = {"a.gguf": b"", "b.gguf": b""}
    for model in ("org/many", "org/many/c.gguf"):
        with pytest.raises(ConfigurationError, match=r"as OWNER/NAME/FILE.gguf; it has a.gguf, b.gguf"):
            ensure_gguf(model, tmp_path, lambda line: None)
    for model in ("./missing.gguf", "missing.gguf"):
        with pytest.raises(ConfigurationError, match="there is no such GGUF file"):
            ensure_gguf(model, tmp_path, lambda line: None)


def test_the_default_model_is_taken_from_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    made = tmp_path / "models" / "SmolLM2-135M-Instruct.Q4_1-whole.gguf"
    made.with_name(made.name + ".lock").mkdir(parents=True)  # no lock can be taken
    made.touch()
    assert ensure_gguf("HuggingFaceTB/SmolLM2-135M-Instruct", tmp_path, lambda line: None) == made


def test_an_adapter_is_two_files(hub: Hub, tmp_path: Path) -> None:
    files = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights"}
    hub.repositories["org/adapter"] = files | {"README.md": b"", "adapter_model.bin": b"", "tokenizer.json": b""}

    def ensured(place: str) -> Path:
        settings = InferenceSettings(_env_file=None, data_dir=tmp_path, model_adapters={"red": place})
        return ensure_adapters(settings, "checkpoint", lambda line: None)["red"]

    assert {path.name: path.read_bytes() for path in ensured("org/adapter").iterdir()} == files
    with pytest.raises(ConfigurationError, match=r"^MODEL_ADAPTERS: red=org/model: no LoRA adapter of PEFT"):
        ensured("org/model")
