"""`forebay plan`: settings that fit a model into a GPU's memory."""

from dataclasses import asdict, dataclass
from typing import Any

from forebay_cli import console
from forebay_cli.sizing.gpu_memory import MAX_SLOTS, QUANTIZATIONS, RESERVE_BYTES, Fit, ModelShape, fit, recommended
from forebay_cli.sizing.model_shape import find_folder, of_folder, of_params, parse_params, parse_size
from forebay_contracts.settings import Settings
from forebay_contracts.wire.errors import ConfigurationError

USUAL_CONTEXT = 8192
"""The context that is planned for where none is asked for; many models could take far more than is ever used."""


@dataclass(frozen=True, slots=True)
class Options:
    """What was asked for; `model` is a hub id, a folder, or a size like 8B."""

    gpu_memory: str
    model: str | None = None
    layers: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    context: int | None = None
    quantization: str | None = None
    concurrency: int = 4
    request_seconds: float = 6.0


@dataclass(frozen=True, slots=True)
class Plan:
    """The recommendation (None: nothing fits), and what each quantization leaves room for."""

    shape: ModelShape
    gpu_bytes: int
    context: int
    fits: list[Fit]
    best: Fit | None

    @property
    def settings(self) -> dict[str, str]:
        """The settings that are recommended."""
        if self.best is None:
            return {}
        return {
            "MODEL_QUANTIZATION": self.best.quantization,
            "MAX_CONCURRENT_REQUESTS": str(self.best.slots),
            "LLM_BATCH_SIZE": str(self.best.batch_tokens),
            "MAX_QUEUE_SIZE": str(self.best.queue_size),
        }


def make(options: Options, settings: Settings) -> Plan:
    """The plan for `options`.

    Raises:
        ConfigurationError: the memory is no size, or the shape of the model is not known here.
    """
    gpu_bytes = parse_size(options.gpu_memory)
    shape = _shape(options, settings)
    context = min(options.context or USUAL_CONTEXT, shape.context_length)
    if shape.carried is not None and options.quantization not in (None, "auto"):
        raise ConfigurationError(f"{shape.name} is quantized already ({shape.carried}): it is loaded as it is")
    wanted: tuple[str, ...] = (options.quantization,) if options.quantization else QUANTIZATIONS
    fits = [
        fit(
            shape,
            gpu_bytes,
            quantization,
            context,
            requests_per_slot=max(1, int(settings.request_timeout / options.request_seconds)),
            max_slots=MAX_SLOTS,
        )
        for quantization in (("auto",) if shape.carried is not None else wanted)
    ]
    return Plan(shape, gpu_bytes, context, fits, recommended(fits, options.concurrency, context))


def show(plan: Plan, *, as_json: bool) -> None:
    """Print the plan; raises ConfigurationError where nothing fits, after it is printed."""
    if as_json:
        console.print_json(_as_json(plan))
    else:
        _print(plan)
    if plan.best is None:
        smallest = min(plan.fits, key=lambda one: one.weights_bytes)
        raise ConfigurationError(
            f"{plan.shape.name} does not fit into {_gib(plan.gpu_bytes)}: its weights take "
            f"{_gib(smallest.weights_bytes)} with {smallest.quantization}, the GPU's own needs {_gib(RESERVE_BYTES)}"
        )


def _shape(options: Options, settings: Settings) -> ModelShape:
    model = options.model or settings.default_model
    if (params := parse_params(model)) is not None:
        return of_params(model, params, options.layers, options.kv_heads, options.head_dim)
    folder = find_folder(model, settings.data_dir)
    if folder is None:
        raise ConfigurationError(
            f"{model} is not on this machine: give a folder with its config.json, or its size, as --model 8B "
            "with --layers, --kv-heads and --head-dim where they are known"
        )
    return of_folder(model, folder)


def _as_json(plan: Plan) -> dict[str, Any]:
    return {
        "model": asdict(plan.shape) | {"params": plan.shape.params},
        "gpu_bytes": plan.gpu_bytes,
        "reserve_bytes": RESERVE_BYTES,
        "context": plan.context,
        "settings": plan.settings,
        "fits": [asdict(one) for one in plan.fits],
    }


def _print(plan: Plan) -> None:
    shape = plan.shape
    columns = ("quantization", "weights", "KV cache", "activations", "left", "context", "concurrent", "batch", "queue")
    rows = [
        (one.quantization, _gib(one.weights_bytes), "does not fit", *[None] * 6)
        if not one.slots
        else (
            one.quantization,
            _gib(one.weights_bytes),
            _gib(one.cache_bytes),
            _gib(one.activation_bytes),
            _gib(one.free_bytes - one.cache_bytes - one.activation_bytes),
            one.context,
            one.slots,
            one.batch_tokens,
            one.queue_size,
        )
        for one in plan.fits
    ]
    title = (
        f"{shape.name}: {shape.params / 1e9:.2f} billion parameters, {plan.fits[0].kv_bytes_per_token / 1024:g} KiB of "
        f"KV cache a token, in {_gib(plan.gpu_bytes)} less {_gib(RESERVE_BYTES)} for CUDA"
    )
    console.print_table(console.table(title, columns, rows))
    for name, value in plan.settings.items():
        console.stdout.print(f"{name}={value}", markup=False)


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.2f} GiB"
