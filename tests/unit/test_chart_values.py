"""The values of the chart deploy/helm: its schema knows each of them, each setting, and refuses everything else."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic import SecretStr

from forebay_contracts.settings import ApiSettings, InferenceSettings, Settings

CHART = Path(__file__).parents[2] / "deploy" / "helm"
SCHEMA: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text())
VALUES: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
TEMPLATES = "\n".join(file.read_text() for file in sorted((CHART / "templates").iterdir()))

SECRETS = {
    name.upper()
    for cls in (ApiSettings, InferenceSettings)
    for name, field in cls.model_fields.items()
    if SecretStr.__name__ in str(field.annotation)
}
DERIVED = {
    *("DEFAULT_MODEL", "MAX_CONCURRENT_REQUESTS", "REQUEST_TIMEOUT", "DATA_DIR", "NATS_REPLICAS", "NATS_URL"),
    *("NATS_CREDENTIALS", "NATS_NKEY_SEED", "NATS_TLS_CA", "NATS_TLS_CERT", "NATS_TLS_KEY"),
    *("API_HOST", "API_PORT", "API_KEYS_FILE", "SHUTDOWN_DELAY"),
    *("WORKER_SLOTS", "INFERENCE_ENGINE", "MODEL_TASK", "METRICS_HOST", "METRICS_PORT"),
    *("ENGINE_COMMAND", "ENGINE_PYTHON", "ENGINE_URL"),
}
"""What the chart sets itself."""
OF_EACH_PROCESS = {"LOG_LEVEL", "LOG_FORMAT", "METRICS"}
NAMES = {"MODEL_NAME", "MODEL_ALIASES", "MODEL_ADAPTERS"}


def fields(cls: type[Settings]) -> set[str]:
    return {name.upper() for name in cls.model_fields} - SECRETS - DERIVED


def known(definition: str) -> set[str]:
    _, names = SCHEMA["definitions"][definition]["propertyNames"]["anyOf"]
    assert names["enum"] == sorted(names["enum"])
    return set(names["enum"])


def test_each_setting_is_where_it_has_an_effect() -> None:
    """A new setting belongs into `settings` of the schema, and into that of the service which alone reads it."""
    shared = fields(Settings)
    api = fields(ApiSettings) - shared - {"DRAIN_TIMEOUT"} | OF_EACH_PROCESS | {"LOG_PROMPTS"}
    model = fields(InferenceSettings) - shared | OF_EACH_PROCESS | NAMES
    assert known("settingsOfApi") == api
    assert known("settingsOfModel") == model
    of_one = {"BATCH_WINDOW", "DRAIN_TIMEOUT", "MODEL_DEVICE"} | NAMES
    assert known("settings") == (shared | api | model) - of_one


def test_no_secret_becomes_a_setting() -> None:
    assert {"API_KEYS", "HF_TOKEN", "ENGINE_API_KEY"} <= SECRETS
    for definition in ("settings", "settingsOfApi", "settingsOfModel"):
        assert not known(definition) & SECRETS


def test_the_schema_has_each_value_and_the_templates_use_it() -> None:
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    jsonschema.validate(VALUES, SCHEMA)

    def compare(schema: dict[str, Any], values: dict[str, Any], place: str) -> None:
        assert schema["additionalProperties"] is False, place
        assert values.keys() <= schema["properties"].keys(), place
        for name, inner in schema["properties"].items():
            if name == "global":  # Helm gives it to a chart that another one depends on
                continue
            # What has no default is in the comments.
            assert name in values or name in ("runtimeClassName", "priorityClassName"), f"{place}.{name}"
            assert re.search(rf"\b{name}\b", TEMPLATES), f"{place}.{name}"
            if "properties" in inner:
                compare(inner, values[name], f"{place}.{name}")

    compare(SCHEMA, VALUES, "")


QWEN: dict[str, Any] = {"model": "Qwen/Qwen2.5-7B-Instruct", "gpus": 1}


@pytest.mark.parametrize(
    "values",
    [
        {"model": {"qwen": QWEN}},
        {"models": {"qwen": QWEN | {"gpus": "1"}}},
        {"models": {"qwen": QWEN | {"slots": 0}}},
        {"models": {"qwen": QWEN | {"task": "embed"}}},
        {"models": {"qwen": QWEN | {"engineOptions": "--max-model-len 1"}}},
        {"models": {"qwen": QWEN | {"nodeSelector": {"gpu": True}}}},
        {"models": {"qwen": QWEN | {"settings": {"MAX_QUEUE_SIZE": 5}}}},
        {"models": {"qwen": QWEN | {"env": [{"name": "A", "valuefrom": {}}]}}},
        {"settings": {"MAX_QUEUE": 5}},
        {"settings": {"max_queue_size": 5}},
        {"settings": {"HF_TOKEN": "hf_x"}},
        {"settings": {"DRAIN_TIMEOUT": 60}},
        {"settings": {"NATS_URL": "nats://nats:4222"}},
        {"api": {"replicas": 0}},
        {"api": {"settings": {"MAX_QUEUE_SIZE": 5}}},
        {"api": {"tolerations": {"key": "a"}}},
        {"images": {"tags": "1"}},
        {"images": {"tag": 1.0}},
        {"images": {"tag": "1@sha256:" + "0" * 64}},
        {"images": {"digests": {"api": "0" * 64}}},
        {"nats": {"url": "nats://user:password@nats:4222"}},
        {"nats": {"url": "nats.example:4222"}},
        {"nats": {"storage": "20"}},
        {"networkPolicies": {"from": []}},
        {"ipFamily": "ipv6"},
    ],
    ids=json.dumps,
)
def test_a_slip_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(values, SCHEMA)


@pytest.mark.parametrize(
    "values",
    [
        {"models": {"qwen": QWEN | {"engine": "vllm", "task": "rerank", "engineOptions": "--max-model-len 1"}}},
        {"models": {"qwen": QWEN | {"tolerations": [{"operator": "Exists"}], "settings": {"LLM_BATCH_SIZE": 64}}}},
        {"settings": {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://otel:4318", "ANSWER_LOG_BYTES": 2_147_483_648}},
        {"nats": {"url": "tls://[2001:db8::1]:4222,tls://b.example"}},
        {"api": {"resources": None}},
        # Of an older values file.
        {"nats": {"maxStore": "16GB", "port": 4222, "egress": [{"ipBlock": {"cidr": "0.0.0.0/0"}}]}},
    ],
    ids=json.dumps,
)
def test_odd_values_are_accepted(values: dict[str, Any]) -> None:
    jsonschema.validate(values, SCHEMA)
