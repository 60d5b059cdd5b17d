"""`forebay plan`: settings that fit a model into a GPU's memory."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from forebay_cli import console
from forebay_cli.declarations import AsJson
from forebay_cli.sizing.gpu_memory import MAX_SLOTS, QUANTIZATIONS, RESERVE_BYTES, Fit, ModelShape, fit, recommended
from forebay_cli.sizing.model_shape import find_folder, of_folder, of_params, parse_params, parse_size
from forebay_contracts.settings import Settings, load
from forebay_contracts.wire.errors import ConfigurationError

USUAL_CONTEXT = 8192
"""The context without --context. Many models could take far more than requests ever use."""


def plan(
    gpu_bytes: Annotated[
        int, typer.Option("--gpu-memory", help="Memory of the GPU, as 24GiB.", parser=parse_size, metavar="SIZE")
    ],
    model: Annotated[
        str | None,
        typer.Option(help="Model on this machine, a folder, or a size like 8B.", show_default="DEFAULT_MODEL"),
    ] = None,
    layers: Annotated[int | None, typer.Option(help="With a size: its layers.", min=1)] = None,
    kv_heads: Annotated[int | None, typer.Option(help="With a size: heads of keys and values.", min=1)] = None,
    head_dim: Annotated[int | None, typer.Option(help="With a size: numbers in a head.", min=1)] = None,
    context: Annotated[
        int, typer.Option(help="Tokens of the longest request, its answer included.", min=512)
    ] = USUAL_CONTEXT,
    quantization: Annotated[
        Literal["none", "int8", "nf4", "fp4"] | None,
        typer.Option(help="Only this one.", show_default="the most precise that serves --concurrency"),
    ] = None,
    concurrency: Annotated[int, typer.Option(help="Requests that run at once.", min=1)] = 4,
    request_seconds: Annotated[float, typer.Option(help="Seconds that one request runs.", min=0.1)] = 6.0,
    as_json: AsJson = False,
) -> None:
    """Recommend settings that fit a model into a GPU's memory."""
    read = load(Settings)
    shape = _shape(model or read.default_model, read.data_dir, layers, kv_heads, head_dim)
    context = min(context, shape.context_length)
    per_slot = max(1, int(read.request_timeout / request_seconds))
    fits = fit_all(shape, gpu_bytes, context, quantization, requests_per_slot=per_slot)
    best = recommended(fits, concurrency, context)
    settings = {} if best is None else best.settings
    if as_json:
        found = {
            "model": asdict(shape) | {"params": shape.params},
            "gpu_bytes": gpu_bytes,
            "reserve_bytes": RESERVE_BYTES,
            "context": context,
            "settings": settings,
            "fits": [asdict(one) for one in fits],
        }
        console.print_json(found)
    else:
        _print(shape, gpu_bytes, fits, settings)
    if best is None:
        smallest = min(fits, key=lambda one: one.weights_bytes)
        raise ConfigurationError(
            f"{shape.name} does not fit into {_gib(gpu_bytes)}: its weights take "
            f"{_gib(smallest.weights_bytes)} with {smallest.quantization}, and CUDA needs {_gib(RESERVE_BYTES)}"
        )


def fit_all(
    shape: ModelShape, gpu_bytes: int, context: int, quantization: str | None, *, requests_per_slot: int
) -> list[Fit]:
    """`fit` for each quantization, or for the given one.

    Raises:
        ConfigurationError: `quantization` is given for a checkpoint that is quantized already.
    """
    if shape.carried is not None and quantization is not None:
        raise ConfigurationError(f"{shape.name} is quantized already ({shape.carried}): it is loaded as it is")
    candidates = ("auto",) if shape.carried is not None else (quantization,) if quantization else QUANTIZATIONS
    return [
        fit(shape, gpu_bytes, one, context, requests_per_slot=requests_per_slot, max_slots=MAX_SLOTS)
        for one in candidates
    ]


def _shape(model: str, data_dir: Path, layers: int | None, kv_heads: int | None, head_dim: int | None) -> ModelShape:
    if (params := parse_params(model)) is not None:
        return of_params(model, params, layers, kv_heads, head_dim)
    folder = find_folder(model, data_dir)
    if folder is None:
        raise ConfigurationError(
            f"{model} is not on this machine: give a folder with its config.json, or its size, as --model 8B "
            "with --layers, --kv-heads and --head-dim where they are known"
        )
    return of_folder(model, folder)


def _print(shape: ModelShape, gpu_bytes: int, fits: list[Fit], settings: dict[str, str]) -> None:
    columns = ("quantization", "weights", "KV cache", "activations", "left", "context", "concurrent", "batch", "queue")
    title = (
        f"{shape.name}: {shape.params / 1e9:.2f} billion parameters, {fits[0].kv_bytes_per_token / 1024:g} KiB of "
        f"KV cache a token, in {_gib(gpu_bytes)} less {_gib(RESERVE_BYTES)} for CUDA"
    )
    console.print_tables(console.table(title, columns, [_row(shape, one) for one in fits]))
    for name, value in settings.items():
        console.stdout.print(f"{name}={value}", markup=False)


def _row(shape: ModelShape, one: Fit) -> tuple[object, ...]:
    partly = shape.expert_params and one.quantization in ("int8", "nf4", "fp4")
    quantization = f"{one.quantization} (experts bf16)" if partly else one.quantization
    if not one.slots:
        return (quantization, _gib(one.weights_bytes), "does not fit", *[None] * 6)
    left = one.free_bytes - one.cache_bytes - one.activation_bytes
    sizes = (one.weights_bytes, one.cache_bytes, one.activation_bytes, left)
    return (quantization, *map(_gib, sizes), one.context, one.slots, one.batch_tokens, one.queue_size)


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.2f} GiB"
