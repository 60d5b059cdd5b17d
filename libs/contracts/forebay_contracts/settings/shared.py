"""The settings of every process."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from forebay_contracts import env_file
from forebay_contracts.wire.errors import ConfigurationError

_URL = re.compile(r"^(nats|tls|ws|wss)://\S+$")
_ADAPTER_NAME = re.compile(r"[\w.-]+", re.ASCII)


def _default_data_dir() -> Path:
    try:
        return Path.home() / ".cache" / "forebay"
    except RuntimeError as exc:
        raise ConfigurationError("DATA_DIR is not set, and this user has no home folder for its default") from exc


def _number(value: Any) -> Any:
    # The environment holds strings, and a Literal of numbers does not accept them.
    return int(value) if isinstance(value, str) and value.isdecimal() else value


class Settings(BaseSettings):
    """The settings of every process: how to reach the queue, and its limits."""

    model_config = SettingsConfigDict(
        env_file=env_file.ENV_FILE,
        env_file_encoding=env_file.ENCODING,
        extra="ignore",
        frozen=True,
        env_ignore_empty=True,
    )

    max_concurrent_requests: int = Field(
        1, ge=1, le=10_000, description="Most requests of one model that run at once, over all its workers"
    )
    max_queue_size: int = Field(
        100,
        ge=1,
        le=10_000_000,
        description="Most unfinished requests, waiting and running together",
    )
    request_timeout: float = Field(
        300, ge=1, le=86_400, description="Seconds from arrival until a request ends with 408"
    )
    default_model: str = Field(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        min_length=1,
        description="Hub id, local folder or GGUF file of the model",
    )
    model_name: str | None = Field(
        None,
        description="Name by which clients ask for the model; empty: the hub id, or the last part of a path",
    )
    model_aliases: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Further names for the model, comma-separated"
    )
    model_adapters: Annotated[dict[str, str], NoDecode] = Field(
        default_factory=dict,
        description="LoRA adapters, as NAME=PLACE, comma-separated; clients ask for MODEL:NAME (docs/engines.md)",
    )
    max_deliveries: int = Field(3, ge=1, le=100, description="Attempts at one request before it fails with 500")
    ack_wait: float = Field(
        5,
        ge=1,
        le=3600,
        description="Seconds without progress reports from a worker until its request is redelivered to another",
    )
    request_state_ttl: float = Field(
        3600,
        ge=1,
        le=2_592_000,
        description="Seconds for which a request's state is kept after its last change",
    )
    response_ttl: float = Field(
        86_400,
        ge=1,
        le=31_536_000,
        description="Seconds for which stored responses and completions are kept after they were asked for",
    )
    answer_log_bytes: int = Field(
        1_073_741_824,
        ge=1_048_576,
        description="Most bytes of stored answers; a token takes about 250. When full: new stored requests get 503",
    )
    background_timeout: float = Field(
        86_400, ge=1, le=2_592_000, description="Seconds from arrival until a background response ends as failed"
    )
    key_max_deferred: int = Field(
        10_000,
        ge=1,
        le=10_000_000,
        description="Most requests of one key and model in the waiting room, where the tier flex waits",
    )
    file_store_bytes: int = Field(
        1_073_741_824,
        ge=1_048_576,
        description="Most bytes of all files, those of batches included; when full, uploads get 503",
    )
    file_ttl: float = Field(
        2_592_000,
        ge=1,
        le=31_536_000,
        description="Seconds for which a file is kept that was uploaded without `expires_after`, and for which the "
        "files of a batch are",
    )
    usage_days: int = Field(
        62, ge=1, le=3_660, description="Days for which it is kept what each key used of each model"
    )
    nats_url: str | None = Field(
        None, description="URLs of NATS servers, comma-separated; empty: `forebay up` starts one of its own"
    )
    nats_credentials: Path | None = Field(None, description="Credentials file (JWT and NKey) for NATS")
    nats_nkey_seed: Path | None = Field(None, description="File with the NKey seed of this service's NATS user")
    nats_tls_ca: Path | None = Field(None, description="CA certificate that verifies the NATS servers")
    nats_tls_cert: Path | None = Field(None, description="Client certificate for NATS; needs NATS_TLS_KEY")
    nats_tls_key: Path | None = Field(None, description="Private key of the client certificate")
    nats_replicas: Annotated[Literal[1, 3, 5], BeforeValidator(_number)] = Field(
        1, description="Replicas of stream, states and counters in a NATS cluster"
    )
    data_dir: Path = Field(
        default_factory=_default_data_dir, description="Folder for model files, logs and the embedded NATS server"
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="Lowest level that is logged")
    log_format: Literal["text", "json"] = Field("text", description="Format of log lines: text, or json for programs")
    log_prompts: bool = Field(False, description="Whether the api logs the bodies of requests, for debugging")
    metrics: bool = Field(True, description="Whether metrics are recorded and served at /metrics")

    @field_validator("model_aliases", mode="before")
    @classmethod
    def _split_commas(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("model_adapters", mode="before")
    @classmethod
    def _adapters_have_names(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        pairs = [part.strip().partition("=") for part in value.split(",") if part.strip()]
        for name, _, place in pairs:
            if not _ADAPTER_NAME.fullmatch(name) or not place:
                raise ValueError("an adapter is like NAME=PLACE, its name of letters, digits, `.`, `_` and `-`")
        if len(found := {name: place for name, _, place in pairs}) < len(pairs):
            raise ValueError("two adapters have one name")
        return found

    @field_validator("data_dir")
    @classmethod
    def _home_is_known(cls, value: Path) -> Path:
        try:
            return value.expanduser()
        except RuntimeError as exc:
            raise ValueError("there is no such user") from exc

    @field_validator("nats_url")
    @classmethod
    def _nats_url_is_a_url(cls, value: str | None) -> str | None:
        if value is not None:
            for url in value.split(","):
                if not _URL.match(url.strip()):
                    raise ValueError(f"NATS_URL must hold URLs like nats://127.0.0.1:4222, not {url.strip()!r}")
        return value

    @model_validator(mode="after")
    def _limits_can_hold(self) -> Self:
        if self.max_concurrent_requests > self.max_queue_size:
            raise ValueError(
                f"MAX_CONCURRENT_REQUESTS={self.max_concurrent_requests} cannot be reached with "
                f"MAX_QUEUE_SIZE={self.max_queue_size}, which counts the processing requests too"
            )
        if self.request_state_ttl < self.request_timeout:
            raise ValueError(
                f"REQUEST_STATE_TTL={self.request_state_ttl:g} would forget requests that may still run: "
                f"it must be at least REQUEST_TIMEOUT={self.request_timeout:g}"
            )
        if self.response_ttl < max(self.background_timeout, self.request_timeout):
            raise ValueError(
                f"RESPONSE_TTL={self.response_ttl:g} would remove answers that may still run: it must be at least "
                f"BACKGROUND_TIMEOUT={self.background_timeout:g} and REQUEST_TIMEOUT={self.request_timeout:g}"
            )
        if (self.nats_tls_cert is None) != (self.nats_tls_key is None):
            raise ValueError("NATS_TLS_CERT and NATS_TLS_KEY are needed together")
        if self.nats_credentials is not None and self.nats_nkey_seed is not None:
            raise ValueError("NATS_CREDENTIALS and NATS_NKEY_SEED are two ways to be one user: set one of them")
        return self

    @property
    def served_model(self) -> str:
        """The name that clients ask for."""
        if self.model_name:
            return self.model_name
        if self._is_local_path():
            return Path(self.default_model).name.removesuffix(".gguf")
        return self.default_model

    @property
    def served_aliases(self) -> tuple[str, ...]:
        """Every other name that means the same model: MODEL_ALIASES, and a hub id without its owner."""
        short = self.served_model.rsplit("/", 1)[-1]
        names = dict.fromkeys((*self.model_aliases, short))
        names.pop(self.served_model, None)
        return tuple(names)

    def _is_local_path(self) -> bool:
        return self.default_model.startswith(("/", "./", "../", "~")) or self.default_model.endswith(".gguf")
