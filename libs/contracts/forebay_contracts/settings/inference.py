"""The settings of a worker."""

import shlex
from typing import Literal, Self

from pydantic import Field, SecretStr, model_validator

from forebay_contracts.settings.shared import Settings


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
