"""Settings from the environment and `.env`, without a prefix. Each service has one class.

Every setting is a field here and a line of `queue-config.env.example`. A test keeps both equal.
"""

import re
import shlex
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BeforeValidator, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from forebay_contracts import env_file
from forebay_contracts.wire.errors import ConfigurationError

_URL = re.compile(r"^(nats|tls|ws|wss)://\S+$")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[a-z0-9.:\[\]_-]+")
_HOST_NAME = re.compile(r"\*|(\*\.)?[a-z0-9_-]+(\.[a-z0-9_-]+)*", re.I)
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


class ApiSettings(Settings):
    """The settings of the api."""

    api_host: str = Field("127.0.0.1", min_length=1, description="Address that the api listens on")
    api_port: int = Field(8091, ge=0, le=65_535, description="Port that the api listens on")
    api_processes: int = Field(1, ge=1, le=64, description="Number of api processes that share the port")
    no_worker_policy: Literal["wait", "refuse"] = Field(
        "wait", description="If the model of a request has no worker now: the request waits, or gets 503"
    )
    api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        (), description="Keys that clients may use, comma-separated; without keys and file, everybody may use the api"
    )
    api_keys_file: Path | None = Field(
        None, description="TOML file of further keys with names, hashes and limits; read again when it changes"
    )
    key_max_requests: int | None = Field(
        None,
        ge=1,
        le=10_000_000,
        description="Most unfinished requests of one key; empty: only MAX_QUEUE_SIZE limits them",
    )
    key_overflow: Literal["refuse", "defer"] = Field(
        "refuse", description="What a key has beyond KEY_MAX_REQUESTS gets 429, or waits in the waiting room"
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Origins whose pages may call the api from a browser (CORS), comma-separated; empty: none"
    )
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Names of this api (`Host`) besides localhost and its machine's, comma-separated, `*.example.com` "
        "for all below; checked as long as there are no keys",
    )
    max_request_bytes: int = Field(
        900_000,
        ge=1_024,
        le=60_000_000,
        description="Largest body of a request; the default limit of NATS for a message is 1 MB",
    )
    body_timeout: float = Field(
        60, ge=1, le=3600, description="Seconds that a client has to send a body, or the next megabyte of a file"
    )
    stream_keep_alive: float = Field(
        15, ge=0, le=3600, description="Seconds without an event after which a stream gets a sign of life; 0: never"
    )
    admission_patience: float = Field(
        10, ge=0, le=3600, description="Seconds that a new request waits for NATS before it gets 503"
    )
    shutdown_delay: float = Field(
        0, ge=0, le=600, description="Seconds after SIGTERM in which the api still serves but is not ready"
    )
    drain_timeout: float = Field(30, ge=0, le=3600, description="Seconds after SIGTERM for running requests to end")
    max_file_bytes: int = Field(
        200_000_000, ge=1_024, le=10_000_000_000, description="Largest file that may be uploaded; more gets 413"
    )
    batch_window: int = Field(
        100, ge=1, le=10_000, description="Most requests of one batch that are queued or run at once"
    )
    webhooks_file: Path | None = Field(
        None, description="TOML file of the receivers of webhooks (docs/webhooks.md); read again when it changes"
    )
    webhook_timeout: float = Field(
        10, ge=0.1, le=30, description="Seconds that the receiver of a webhook has to answer"
    )
    webhook_retry_max: float = Field(
        3600, ge=0.1, le=86_400, description="Longest pause, in seconds, between two tries at a webhook"
    )

    @field_validator("api_keys", "cors_origins", "allowed_hosts", mode="before")
    @classmethod
    def _split_list(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        parts = tuple(part.strip() for part in value.split(",") if part.strip())
        # Without keys the api is open to all, which must not come from a slip.
        if value and not parts:
            raise ValueError("this names nothing; leave it empty to have none")
        return parts

    @field_validator("cors_origins")
    @classmethod
    def _origins_are_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            if not _ORIGIN.fullmatch(origin):
                raise ValueError(f"an origin is like https://chat.example.com, without a path, not {origin!r}")
        return value

    @field_validator("allowed_hosts")
    @classmethod
    def _hosts_are_names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for host in value:
            if not _HOST_NAME.fullmatch(host):
                raise ValueError(f"a host is like forebay.example.com, without a scheme or a port, not {host!r}")
        return value


class InferenceSettings(Settings):
    """The settings of a worker."""

    worker_slots: int | None = Field(
        None,
        ge=1,
        le=10_000,
        description="Most requests that one worker runs at once; empty: MAX_CONCURRENT_REQUESTS",
    )
    llm_batch_size: int = Field(
        256, ge=1, le=1_000_000, description="Most tokens in one forward pass of the continuous batch"
    )
    model_quantization: Literal["auto", "none", "int8", "nf4", "fp4"] = Field(
        "auto",
        description="bitsandbytes quantization; auto: the checkpoint's own, else nf4, on a GPU none where that fits",
    )
    hf_token: SecretStr | None = Field(None, description="Token for private and gated models of the hub")
    model_device: str = Field("auto", min_length=1, description="auto, cpu, cuda or cuda:N")
    allow_untested_models: bool = Field(
        False,
        description="Serve architectures that no test has compared, after a check at start (docs/models.md)",
    )
    inference_engine: Literal["transformers", "llamacpp", "vllm", "sglang", "openai", "embedding", "simulated"] = Field(
        "transformers",
        description="transformers; llamacpp, vllm or sglang (an inference server beside the worker); "
        "openai (text from any OpenAI-compatible server at ENGINE_URL); "
        "embedding (a sentence-transformers model), or simulated (no model, for tests)",
    )
    model_task: Literal["auto", "generate", "embed", "rerank"] = Field(
        "auto",
        description="What the model is for: generate, embed or rerank; auto: embed with INFERENCE_ENGINE=embedding, "
        "else generate",
    )
    engine_command: str | None = Field(
        None,
        min_length=1,
        description="Command that starts the inference server; "
        "{python}, {model}, {name}, {port}, {slots} and {dtype} are filled in",
    )
    engine_python: str | None = Field(
        None,
        min_length=1,
        description="Python of the environment that the inference server is installed in; empty: the worker's own",
    )
    engine_url: str | None = Field(
        None,
        pattern=r"^https?://",
        description="Address of an inference server that runs already; empty: the worker starts one",
    )
    engine_api_key: SecretStr | None = Field(None, description="Key that the inference server wants")
    engine_start_timeout: float = Field(
        900, ge=1, le=86_400, description="Seconds in which an inference server must have loaded its model"
    )
    closed_schemas: bool = Field(
        True,
        description="Whether objects of an answer have only the properties that their JSON schema names, "
        "where it does not give `additionalProperties`",
    )
    drain_timeout: float = Field(30, ge=0, le=3600, description="Seconds after SIGTERM for running requests to end")
    engine_stall_timeout: float = Field(
        120,
        ge=1,
        le=86_400,
        description="Seconds without a forward pass, with requests in the batch, after which the worker exits",
    )
    metrics_port: int | None = Field(
        None,
        ge=0,
        le=65_535,
        description="Port of a worker's /metrics and /health, different for each worker of a machine; empty: none",
    )
    metrics_host: str = Field("127.0.0.1", min_length=1, description="Address of a worker's /metrics and /health")

    @property
    def slots(self) -> int:
        """Most requests that this worker processes at once."""
        return self.worker_slots or self.max_concurrent_requests

    @model_validator(mode="after")
    def _slots_can_be_used(self) -> Self:
        if self.slots > self.max_concurrent_requests:
            raise ValueError(
                f"WORKER_SLOTS={self.slots} cannot be used with "
                f"MAX_CONCURRENT_REQUESTS={self.max_concurrent_requests}, which bounds the model over all workers"
            )
        sizes_its_own_passes = self.inference_engine in ("vllm", "sglang", "openai")
        if self.llm_batch_size < self.slots and not sizes_its_own_passes:
            raise ValueError(
                f"LLM_BATCH_SIZE={self.llm_batch_size} tokens cannot carry {self.slots} slots: "
                f"each running request takes one token of a forward pass"
            )
        return self

    @model_validator(mode="after")
    def _engine_has_the_task(self) -> Self:
        engine, task = self.inference_engine, self.model_task
        pools = task in ("embed", "rerank")
        if (pools and engine in ("transformers", "openai")) or (task == "generate" and engine == "embedding"):
            raise ValueError(f"MODEL_TASK={task} cannot be had from INFERENCE_ENGINE={engine}")
        if pools and self.model_adapters:
            raise ValueError(f"MODEL_ADAPTERS are for models that generate, and MODEL_TASK={task} is set")
        return self

    @model_validator(mode="after")
    def _server_is_started_or_found(self) -> Self:
        if self.engine_url is not None and "@" in self.engine_url:
            raise ValueError("ENGINE_URL is logged and takes no user or password: give ENGINE_API_KEY")
        try:
            words = ["-"] if self.engine_command is None else shlex.split(self.engine_command)
        except ValueError as exc:
            raise ValueError(f"ENGINE_COMMAND cannot be split into words: {exc}") from exc
        if not words:
            raise ValueError("ENGINE_COMMAND has no words")
        if self.engine_command is not None and self.engine_url is not None:
            raise ValueError("ENGINE_COMMAND starts an inference server and ENGINE_URL names one: give one of them")
        if self.inference_engine == "openai" and self.engine_url is None:
            raise ValueError("INFERENCE_ENGINE=openai asks a server that runs already: set ENGINE_URL")
        return self


S = TypeVar("S", bound=Settings)


def load(cls: type[S], **overrides: Any) -> S:
    """Read the settings, and describe every error in one sentence.

    Raises:
        ConfigurationError: it names each wrong setting and says why.
    """
    try:
        env_file.check()
        return cls(**overrides)
    except ValidationError as exc:
        raise ConfigurationError("; ".join(_sentence(error) for error in exc.errors())) from exc


def _sentence(error: Any) -> str:
    message: str = error["msg"].removeprefix("Value error, ")
    if not error["loc"]:
        return message
    return f"{str(error['loc'][0]).upper()}={error['input']!r}: {message}"
