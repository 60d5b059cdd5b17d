"""`forebay plan`: settings that fit a model into a GPU's memory."""

from dataclasses import asdict
from functools import partial
from typing import Annotated, Literal

import typer
from pydantic import SecretStr

from forebay_cli import console
from forebay_cli.declarations import AsJson
from forebay_cli.helm_values import helm_values
from forebay_cli.hub import config_of_hub
from forebay_contracts.settings import Settings, load
from forebay_contracts.sizing.gpu_memory import (
    ENGINES,
    MAX_SLOTS,
    RESERVE_BYTES,
    USUAL_CONTEXT,
    Fit,
    ModelShape,
    fit,
    recommended,
)
from forebay_contracts.sizing.model_shape import find_folder, of_config, of_folder, of_params, parse_params, parse_size
from forebay_contracts.wire.errors import ConfigurationError

COLUMNS = ("quantization", "weights", "KV cache", "activations", "left", "context", "concurrent", "batch", "queue")


class PlanSettings(Settings):
    """What a plan reads of the settings: those of a worker may be the ones that do not fit yet."""

    hf_token: SecretStr | None = None


def plan(
    gpu_bytes: Annotated[
        int, typer.Option("--gpu-memory", help="Memory of the GPU: 24 or 24GiB.", parser=parse_size, metavar="SIZE")
    ],
    named: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="A hub id, a folder, or a size like 8B.", show_default="DEFAULT_MODEL"),
    ] = None,
    model: Annotated[str | None, typer.Option(help="The same as MODEL.")] = None,
    layers: Annotated[int | None, typer.Option(help="With a size: its layers.", min=1)] = None,
    kv_heads: Annotated[int | None, typer.Option(help="With a size: heads of keys and values.", min=1)] = None,
    head_dim: Annotated[int | None, typer.Option(help="With a size: numbers in a head.", min=1)] = None,
    context: Annotated[
        int, typer.Option(help="Tokens of the longest request, its answer included.", min=512)
    ] = USUAL_CONTEXT,
    quantization: Annotated[
        str | None,
        typer.Option(help="Only this one.", show_default="the most precise that serves --concurrency"),
    ] = None,
    engine: Annotated[
        Literal["transformers", "vllm", "sglang", "llamacpp"], typer.Option(help="The engine that serves it.")
    ] = "transformers",
    flash: Annotated[
        bool, typer.Option(help="With the engine transformers: whether flash attention is installed (forebay[gpu]).")
    ] = True,
    concurrency: Annotated[int, typer.Option(help="Requests that run at once.", min=1)] = 4,
    request_seconds: Annotated[float, typer.Option(help="Seconds that one request runs.", min=0.1)] = 6.0,
    as_helm_values: Annotated[
        bool, typer.Option("--helm-values", help="Print values of the chart deploy/helm (docs/helm.md).")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Recommend settings that fit a model into a GPU's memory."""
    read = load(PlanSettings)
    shape = _shape(model or named or read.default_model, read, layers, kv_heads, head_dim)
    context = min(context, shape.context_length)
    per_slot = max(1, int(read.request_timeout / request_seconds))
    fits = fit_all(shape, gpu_bytes, context, quantization, requests_per_slot=per_slot, engine=engine, flash=flash)
    best = recommended(fits, concurrency, context)
    settings = {} if best is None else settings_of(best, engine)
    options = "" if best is None else options_of(best, engine)
    if as_json:
        found = {
            "engine": engine,
            "model": asdict(shape) | {"params": shape.params},
            "gpu_bytes": gpu_bytes,
            "reserve_bytes": RESERVE_BYTES,
            "context": context,
            "settings": settings,
            "options": options,
            "fits": [asdict(one) for one in fits],
        }
        console.print_json(found)
    elif as_helm_values:
        if best is not None:
            values = helm_values(shape, best, settings, options, read.request_timeout)
            console.stdout.print(values, markup=False, soft_wrap=True)
    else:
        _print(shape, gpu_bytes, fits, settings)
        if options:
            console.stdout.print(f"# options of {engine}: {options}", markup=False, soft_wrap=True)
    if best is None:
        smallest = min(fits, key=lambda one: one.weights_bytes)
        raise ConfigurationError(
            f"{shape.name} does not fit into {_gib(gpu_bytes)}: its weights take "
            f"{_gib(smallest.weights_bytes)} with {smallest.quantization}, and CUDA needs {_gib(RESERVE_BYTES)}"
        )


def fit_all(
    shape: ModelShape,
    gpu_bytes: int,
    context: int,
    quantization: str | None,
    *,
    requests_per_slot: int,
    engine: str = "transformers",
    flash: bool = True,
) -> list[Fit]:
    """`fit` for each quantization of `engine`, or for the given one.

    Raises:
        ConfigurationError: `quantization` is given for a checkpoint that is quantized already, or `engine` has none of
            that name.
    """
    known = ENGINES[engine].quantizations
    if shape.carried is not None and quantization is not None:
        raise ConfigurationError(f"{shape.name} is quantized already ({shape.carried}): it is loaded as it is")
    if quantization is not None and quantization not in (*known, *(("fp4",) if "nf4" in known else ())):
        raise ConfigurationError(f"--quantization {quantization}: {engine} has {', '.join(known)}")
    candidates = ("auto",) if shape.carried is not None else (quantization,) if quantization else known
    of_one = partial(fit, requests_per_slot=requests_per_slot, max_slots=MAX_SLOTS, engine=engine, flash=flash)
    return [of_one(shape, gpu_bytes, one, context) for one in candidates]


def settings_of(best: Fit, engine: str) -> dict[str, str]:
    """The settings of Forebay for `best`."""
    slots, queue = str(best.slots), str(best.queue_size)
    if engine != "transformers":
        return {"INFERENCE_ENGINE": engine, "MAX_CONCURRENT_REQUESTS": slots, "MAX_QUEUE_SIZE": queue}
    return {
        "MODEL_QUANTIZATION": best.quantization,
        "MAX_CONCURRENT_REQUESTS": slots,
        "LLM_BATCH_SIZE": str(best.batch_tokens),
        "MAX_QUEUE_SIZE": queue,
    }


def options_of(best: Fit, engine: str) -> str:
    """The options of a served engine's own command for `best`; empty for the transformers engine."""
    fp8 = " --quantization fp8" if best.quantization == "fp8" else ""
    slots, batch, context = best.slots, best.batch_tokens, best.context
    match engine:
        case "vllm":
            return f"--max-num-seqs {slots} --max-num-batched-tokens {batch} --max-model-len {context}{fp8}"
        case "sglang":
            return f"--max-running-requests {slots} --chunked-prefill-size {batch} --context-length {context}{fp8}"
        case "llamacpp":
            # The context of llama.cpp's server is that of all its slots together.
            limits = f"--parallel {slots} --ctx-size {slots * context} --ubatch-size {batch}"
            return f"{limits} (with a GGUF in {best.quantization})"
        case _:
            return ""


def _shape(
    model: str, read: PlanSettings, layers: int | None, kv_heads: int | None, head_dim: int | None
) -> ModelShape:
    if (params := parse_params(model)) is not None:
        return of_params(model, params, layers, kv_heads, head_dim)
    if (folder := find_folder(model, read.data_dir)) is not None:
        return of_folder(model, folder)
    try:
        return of_config(model, config_of_hub(model, read.hf_token))
    except ConfigurationError as exc:
        raise ConfigurationError(
            f"{model} is not on this machine, and {exc}: give a folder with its config.json, or its size, as "
            "--model 8B with --layers, --kv-heads and --head-dim where they are known"
        ) from exc


def _print(shape: ModelShape, gpu_bytes: int, fits: list[Fit], settings: dict[str, str]) -> None:
    title = (
        f"{shape.name}: {shape.params / 1e9:.2f} billion parameters, {fits[0].kv_bytes_per_token / 1024:g} KiB of "
        f"KV cache a token, in {_gib(gpu_bytes)} less {_gib(RESERVE_BYTES)} for CUDA; sizes in GiB"
    )
    console.print_tables(console.table(title, COLUMNS, [_row(shape, one) for one in fits]))
    for name, value in settings.items():
        console.stdout.print(f"{name}={value}", markup=False)


def _row(shape: ModelShape, one: Fit) -> tuple[object, ...]:
    partly = shape.expert_params and one.quantization in ("int8", "nf4", "fp4")
    quantization = f"{one.quantization} (experts bf16)" if partly else one.quantization
    if not one.slots:
        return (quantization, _number(one.weights_bytes), "no room", *[None] * 6)
    left = one.free_bytes - one.cache_bytes - one.activation_bytes
    sizes = (one.weights_bytes, one.cache_bytes, one.activation_bytes, left)
    return (quantization, *map(_number, sizes), one.context, one.slots, one.batch_tokens, one.queue_size)


def _number(size: int) -> str:
    return f"{size / (1 << 30):.2f}"


def _gib(size: int) -> str:
    return f"{_number(size)} GiB"
