import itertools
import re
from pathlib import Path
from typing import Any

import pytest

from forebay_contracts.settings import ApiSettings, InferenceSettings, Settings, load
from forebay_contracts.telemetry import tracing
from forebay_contracts.wire.errors import ConfigurationError

EXAMPLE = Path(__file__).parents[2] / "queue-config.env.example"
CLASSES = (ApiSettings, InferenceSettings)


def example_lines() -> list[str]:
    return EXAMPLE.read_text().splitlines()


def set_up(title: str) -> dict[str, str]:
    """The settings of the commented block that begins with `# title`."""
    lines = example_lines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"# {title}")) + 1
    found = {}
    for line in lines[start:]:
        if not (match := re.fullmatch(r"#([A-Z_]+)=(.+)", line)):
            break
        found[match[1]] = match[2]
    return found


def test_the_example_holds_every_setting_once() -> None:
    names = [line.split("=")[0] for line in example_lines() if line and not line.startswith("#")]
    fields = {name.upper() for cls in CLASSES for name in cls.model_fields}
    assert sorted(names) == sorted(fields)


def test_every_setting_of_the_example_says_why() -> None:
    lines = example_lines()
    for before, line in itertools.pairwise(lines):
        if line and not line.startswith("#"):
            assert re.match(r"# \w.{10,}", before), f"{line} has no comment"


@pytest.mark.parametrize("cls", CLASSES)
def test_the_example_holds_the_defaults(cls: type[Settings]) -> None:
    assert load(cls, _env_file=EXAMPLE) == load(cls)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(
    ("title", "limits"),
    [("Throughput", (3, 50, 180)), ("Memory-constrained", (1, 200, 600)), ("Default", (1, 100, 300))],
)
def test_the_three_set_ups_can_hold(
    monkeypatch: pytest.MonkeyPatch, cls: type[Settings], title: str, limits: tuple[int, int, float]
) -> None:
    for name, value in set_up(title).items():
        monkeypatch.setenv(name, value)
    settings = load(cls)
    assert (settings.max_concurrent_requests, settings.max_queue_size, settings.request_timeout) == limits


@pytest.mark.parametrize(
    ("cls", "given", "sentence"),
    [
        (
            Settings,
            {"MAX_CONCURRENT_REQUESTS": "5", "MAX_QUEUE_SIZE": "4"},
            "MAX_CONCURRENT_REQUESTS=5 cannot be reached with MAX_QUEUE_SIZE=4, "
            "which counts the processing requests too",
        ),
        (
            Settings,
            {"REQUEST_STATE_TTL": "10", "REQUEST_TIMEOUT": "20"},
            "REQUEST_STATE_TTL=10 would forget requests that may still run: it must be at least REQUEST_TIMEOUT=20",
        ),
        (Settings, {"NATS_TLS_CERT": "cert.pem"}, "NATS_TLS_CERT and NATS_TLS_KEY are needed together"),
        (Settings, {"NATS_TLS_KEY": "key.pem"}, "NATS_TLS_CERT and NATS_TLS_KEY are needed together"),
        (
            InferenceSettings,
            {"WORKER_SLOTS": "3", "MAX_CONCURRENT_REQUESTS": "2"},
            "WORKER_SLOTS=3 cannot be used with MAX_CONCURRENT_REQUESTS=2, which bounds the model over all workers",
        ),
        (
            InferenceSettings,
            {"MAX_CONCURRENT_REQUESTS": "8", "LLM_BATCH_SIZE": "4"},
            "LLM_BATCH_SIZE=4 tokens cannot carry 8 slots: each running request takes one token of a forward pass",
        ),
        (
            Settings,
            {"NATS_URL": "localhost:4222"},
            "NATS_URL='localhost:4222': NATS_URL must hold URLs like nats://127.0.0.1:4222, not 'localhost:4222'",
        ),
        (Settings, {"MAX_QUEUE_SIZE": "0"}, "MAX_QUEUE_SIZE='0': Input should be greater than or equal to 1"),
        (Settings, {"NATS_REPLICAS": "2"}, "NATS_REPLICAS=2: Input should be 1, 3 or 5"),
        (
            InferenceSettings,
            {"MODEL_ADAPTERS": "a:b=/place"},
            "MODEL_ADAPTERS='a:b=/place': an adapter is like NAME=PLACE, its name of letters, digits, `.`, `_` and `-`",
        ),
        (InferenceSettings, {"MODEL_ADAPTERS": "a=x,a=y"}, "MODEL_ADAPTERS='a=x,a=y': two adapters have one name"),
        (ApiSettings, {"API_PORT": "70000"}, "API_PORT='70000': Input should be less than or equal to 65535"),
        (
            InferenceSettings,
            {"MODEL_QUANTIZATION": "int3"},
            "MODEL_QUANTIZATION='int3': Input should be 'auto', 'none', 'int8', 'nf4' or 'fp4'",
        ),
    ],
)
def test_what_cannot_hold_is_refused_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, cls: type[Settings], given: dict[str, str], sentence: str
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError) as refused:
        load(cls)
    assert str(refused.value) == sentence


def test_a_server_that_sizes_its_own_passes_takes_any_number_of_slots() -> None:
    given = {"inference_engine": "vllm", "max_concurrent_requests": 8, "llm_batch_size": 4}
    assert load(InferenceSettings, _env_file=None, **given).slots == 8


def test_two_faults_are_both_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_QUEUE_SIZE", "none")
    monkeypatch.setenv("LOG_LEVEL", "LOUD")
    with pytest.raises(ConfigurationError, match=r"MAX_QUEUE_SIZE='none'.*; LOG_LEVEL='LOUD'"):
        load(Settings)


@pytest.mark.parametrize(
    ("given", "served", "aliases"),
    [
        ({}, "HuggingFaceTB/SmolLM2-135M-Instruct", ("SmolLM2-135M-Instruct",)),
        ({"DEFAULT_MODEL": "/models/tiny.gguf"}, "tiny", ()),
        ({"DEFAULT_MODEL": "./some/folder"}, "folder", ()),
        ({"MODEL_NAME": "mine", "MODEL_ALIASES": "a, b,,mine"}, "mine", ("a", "b")),
    ],
)
def test_the_names_of_the_model(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], served: str, aliases: tuple[str, ...]
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    settings = load(Settings)
    assert (settings.served_model, settings.served_aliases) == (served, aliases)


def test_adapters_have_names_and_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL_ADAPTERS", "red=/a=b/red, blue-1.0=org/blue,")
    assert load(InferenceSettings).model_adapters == {"red": "/a=b/red", "blue-1.0": "org/blue"}


def test_the_environment_is_stronger_than_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("MAX_QUEUE_SIZE=7\nAPI_KEYS=one, two\n")
    monkeypatch.setenv("MAX_QUEUE_SIZE", "8")
    settings = load(ApiSettings)
    assert settings.max_queue_size == 8
    assert [key.get_secret_value() for key in settings.api_keys] == ["one", "two"]


def test_a_file_of_any_editor_is_read_or_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / ".env"
    file.write_bytes(b"\xef\xbb\xbfMAX_QUEUE_SIZE=7\r\nMODEL_NAME=mod\xc3\xa8le\r\n")
    assert (load(Settings).max_queue_size, load(Settings).served_model) == (7, "modèle")
    for wrong in ("MAX_QUEUE_SIZE=7".encode(encoding) for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32")):
        file.write_bytes(wrong)
        with pytest.raises(ConfigurationError, match=r"\.env is no text in UTF-8"):
            load(Settings)
    file.write_bytes(b"MODEL_NAME=mod\xe8le")  # Latin-1
    with pytest.raises(ConfigurationError, match=r"\.env is no text in UTF-8"):
        load(Settings)
    file.unlink()
    file.mkdir()
    assert load(Settings).max_queue_size == 100


def test_a_file_that_may_not_be_read_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").touch()

    def denied(path: Path, _: str) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", denied)  # root may read everything
    with pytest.raises(ConfigurationError, match=r"\.env cannot be read: permission denied"):
        load(Settings)


def test_a_user_without_a_home_sets_data_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("DATA_DIR", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(ConfigurationError, match="DATA_DIR is not set"):
        load(Settings)
    with pytest.raises(ConfigurationError, match="DATA_DIR='~nobody-here/x': there is no such user"):
        load(Settings, data_dir="~nobody-here/x")


@pytest.mark.parametrize("name", ["API_KEYS", "CORS_ORIGINS", "ALLOWED_HOSTS"])
@pytest.mark.parametrize("value", [",", " ", " , ,"])
def test_a_list_that_is_set_and_names_nothing_is_an_error(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match=f"{name}=.*names nothing"):
        load(ApiSettings)
    monkeypatch.setenv(name, "")
    assert load(ApiSettings).api_keys == ()


def test_a_number_of_a_choice_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NATS_REPLICAS", "3")
    assert load(Settings).nats_replicas == 3


def test_keys_are_not_shown() -> None:
    overrides: dict[str, Any] = {"api_keys": "very-secret"}
    assert "very-secret" not in repr(load(ApiSettings, **overrides))


def test_settings_of_opentelemetry_come_from_the_file_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_TRACES_EXPORTER", "OTEL_SDK_DISABLED"):
        monkeypatch.setenv(name, "")  # what is set from here on is undone
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("OTEL_TRACES_EXPORTER=zipkin\nOTEL_SDK_DISABLED=\n")
    with pytest.raises(ConfigurationError, match="OTEL_TRACES_EXPORTER='zipkin'"):
        tracing.configure("tests")
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    tracing.configure("tests")
    assert not tracing.enabled()
