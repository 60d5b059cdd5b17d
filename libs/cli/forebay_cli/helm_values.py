"""An entry of `models` in the values of the chart deploy/helm, from a plan."""

import hashlib
import json
import math
import re

from forebay_contracts.sizing.gpu_memory import Fit, ModelShape, weights_bytes
from forebay_contracts.sizing.model_shape import parse_params

_MEMORY_STEP_GIB = 4
_MOST_LETTERS = 40


def helm_values(shape: ModelShape, best: Fit, settings: dict[str, str], options: str, request_timeout_s: float) -> str:
    """The values as YAML. `settings` and `options` are those of the plan, which the chart multiplies by `gpus`.

    `model` stays empty, and the chart refuses it, where the plan knows no name under which a worker finds the model.
    """
    engine = settings.get("INFERENCE_ENGINE", "transformers")
    gguf = engine == "llamacpp"
    here = shape.name.startswith(("/", ".", "~"))  # a folder of this machine
    nameless = here or parse_params(shape.name) is not None or (gguf and not shape.name.endswith(".gguf"))
    wanted = "its hub id, or its path on the models' volume"
    if gguf:
        wanted = f"a GGUF file in {best.quantization}, as OWNER/NAME/FILE.gguf"
    entry: dict[str, object] = {
        "model": "" if nameless else shape.name,
        "gpus": 1,
        "slots": best.slots,
        "queue": best.queue_size,
        # The weights pass through main memory on their way to the GPU, in 16 bits or as the file has them.
        "memoryGiB": _main_memory_gib(best.weights_bytes if gguf else weights_bytes(shape, "none")),
    }
    if engine != "transformers":
        entry["engine"] = engine
        # The chart gives the slots itself. Of llama.cpp, the rest of the line is a note.
        entry["engineOptions"] = " ".join(options.partition(" (")[0].split()[2:])
    entry["settings"] = {name: settings[name] for name in ("MODEL_QUANTIZATION", "LLM_BATCH_SIZE") if name in settings}
    notes = {"gpus": "workers, each with one GPU", "slots": "requests that a worker runs at once"}
    notes |= {"queue": "unfinished requests for each worker"} | ({"model": wanted} if nameless else {})
    lines = [
        f"    {key}: {json.dumps(value)}" + (f"  # {notes[key]}" if key in notes else "")
        for key, value in entry.items()
    ]
    name = _label(shape.name)
    # Quoted, because YAML takes some names for a number or a boolean.
    return "\n".join((f"requestTimeout: {math.ceil(request_timeout_s)}", "models:", f'  "{name}":', *lines))


def _main_memory_gib(size: int) -> int:
    # A tenth for all that is not weights.
    return math.ceil(size * 1.1 / (1 << 30) / _MEMORY_STEP_GIB) * _MEMORY_STEP_GIB


def _label(model: str) -> str:
    """A DNS label of the model's name without its owner, for the names of its objects."""
    last = model.rstrip("/").rsplit("/", 1)[-1].removesuffix(".gguf")
    label = re.sub(r"[^a-z0-9]+", "-", last.lower()).strip("-") or "model"
    if len(label) <= _MOST_LETTERS:
        return label
    # Long names of one family differ in their ends, such as the quantization of a GGUF file.
    return f"{label[:33].rstrip('-')}-{hashlib.sha256(label.encode()).hexdigest()[:6]}"
