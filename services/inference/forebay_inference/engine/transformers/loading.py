"""Loading: device, quantization, weights and tokenizer."""

import ctypes
import gc
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils import logging as transformers_logging

from forebay_contracts.sizing.gpu_memory import MAX_SLOTS, RESERVE_BYTES, USUAL_CONTEXT, fit, weights_bytes
from forebay_contracts.sizing.model_shape import of_folder
from forebay_contracts.wire.errors import ConfigurationError
from forebay_inference.engine.transformers import architectures
from forebay_inference.engine.transformers.devices import resolve_device, use_cpus
from forebay_inference.engine.transformers.packing import pack_linears

_log = logging.getLogger(__name__)
# bitsandbytes warns at every call of a cast that is meant, and of an optional kernel from a model hub.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# The library reports weights that do not fit in a table; here they are refused in a sentence.
logging.getLogger("transformers.modeling_utils").setLevel(logging.ERROR)
transformers_logging.disable_progress_bar()

_NAMED_KEYS = 3
_SAVED_TABLE = re.compile(r"\.(attn|attention)\.(masked_)?bias$|\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
_LAYER = re.compile(r"\.layers\.(\d+)\.")
_REASON_CHARACTERS = 300
# Not given, the library asks on the terminal whether to run code of the checkpoint.
_OWN_CODE_ONLY = {"trust_remote_code": False}
_CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in memory. `context_length` is what its configuration allows, in tokens."""

    model: Any
    tokenizer: Any
    device: torch.device
    quantization: str
    context_length: int
    end_tokens: frozenset[int]


def load(
    folder: Path,
    quantization: str,
    device_name: str,
    progress: Callable[[str], None],
    *,
    slots: int = 1,
    allow_untested: bool = False,
) -> Loaded:
    """Load the checkpoint in `folder`; blocks. `auto` quantizes on a GPU only where `slots` requests need that.

    Raises:
        ConfigurationError: the checkpoint is broken or of an architecture that is not served, or the device or the
            quantization cannot be had with it on this machine.
    """
    started = time.monotonic()
    device = resolve_device(device_name)
    use_cpus(device)
    if device.type == "cuda":
        # Of this thread, which makes the batch too: the library measures the memory of the current device.
        torch.cuda.set_device(device)
    config = _read_config(folder)
    architectures.check(config, allow_untested=allow_untested)
    if quantization == "auto" and device.type == "cuda" and getattr(config, "quantization_config", None) is None:
        free, _ = torch.cuda.mem_get_info(device)
        quantization, reason = quantization_that_fits(folder, free, slots)
        progress(f"MODEL_QUANTIZATION=auto: {quantization}, since {reason}")
    resolved, settings = _resolve_quantization(quantization, config, device)
    progress(f"loading the weights ({resolved}, {device})")
    with _in_one_sentence(f"{folder} holds no tokenizer that can be read"):
        tokenizer = AutoTokenizer.from_pretrained(folder, **_OWN_CODE_ONLY)
    options: dict[str, Any] = {"dtype": _dtype(device), "device_map": {"": device}, **_OWN_CODE_ONLY}
    if settings is not None:
        options["quantization_config"] = settings
    with _in_one_sentence(f"the weights in {folder} cannot be loaded"):
        # The keys that do not fit are refused below, by name; the library would raise without one.
        options |= {"ignore_mismatched_sizes": True, "output_loading_info": True}
        model, found = AutoModelForCausalLM.from_pretrained(folder, **options)
    _refuse_wrong_keys(folder, found, config)
    model = model.eval()
    model.requires_grad_(False)
    if (actual := _actual_quantization(model, resolved)) != resolved:
        progress(f"bitsandbytes does not quantize all of this model: {actual}")
    if device.type == "cpu":
        with torch.inference_mode():
            pack_linears(model, join=config.model_type in architectures.TESTED)
    give_back_memory()
    progress(f"loaded the weights in {time.monotonic() - started:.1f} s")
    return Loaded(model, tokenizer, device, actual, _context_length(config), _end_tokens(model, tokenizer))


@contextmanager
def _in_one_sentence(what: str) -> Iterator[None]:
    """Make a ConfigurationError of whatever is raised within: a checkpoint can be broken in any number of ways."""
    try:
        yield
    except UnpicklingError as exc:
        raise ConfigurationError(f"{what}: its .bin file holds more than weights, and is not loaded") from exc
    except Exception as exc:
        reason = " ".join(str(exc).split())[:_REASON_CHARACTERS] or type(exc).__name__
        raise ConfigurationError(f"{what}: {reason}") from exc


def _refuse_wrong_keys(folder: Path, found: Mapping[str, Any], config: Any) -> None:
    """Refuse weights that are not those of the model; the library would make up what is missing.

    What the model's class declares as harmless, and tied weights, are not in `found`.
    """
    for kind in ("missing", "unexpected", "mismatched"):
        keys = sorted(key if isinstance(key, str) else key[0] for key in found[f"{kind}_keys"])
        if kind == "unexpected":
            keys = [key for key in keys if not _is_harmless(key, config)]
        if keys:
            more = f" and {len(keys) - _NAMED_KEYS} more" if len(keys) > _NAMED_KEYS else ""
            names = ", ".join(keys[:_NAMED_KEYS]) + more
            what = "weights of the wrong shape" if kind == "mismatched" else f"{kind} weights"
            raise ConfigurationError(f"the checkpoint in {folder} has {what}: {names}")


def _is_harmless(key: str, config: Any) -> bool:
    """Whether `key` is a causal mask or a table that models once saved, or belongs to a layer that predicts further
    tokens, which is not served."""
    layer = _LAYER.search(key)
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    further = getattr(config.get_text_config(), "num_nextn_predict_layers", None) or 0
    return bool(_SAVED_TABLE.search(key)) or (layer is not None and layers <= int(layer[1]) < layers + further)


def _actual_quantization(model: Any, resolved: str) -> str:
    """`resolved`, and what bitsandbytes left in 16 bits: it takes linear layers alone, and none of a class of the
    model's own. Experts lie in one tensor for each layer."""
    if resolved not in ("int8", "nf4", "fp4"):
        return resolved
    if all(parameter.is_floating_point() for parameter in model.parameters()):
        return "none"
    if any(".experts." in name and tensor.is_floating_point() for name, tensor in model.named_parameters()):
        return f"{resolved} (experts {'bf16' if model.dtype == torch.bfloat16 else 'fp16'})"
    return resolved


def give_back_memory() -> None:
    """Return what loading and quantizing took for a while: the C library would keep it for good."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        _log.debug("this C library gives no memory back on demand")


def _read_config(folder: Path) -> Any:
    if (folder / "adapter_config.json").is_file():
        raise ConfigurationError(f"{folder} holds an adapter; merge it into its base model and serve the result")
    with _in_one_sentence(f"{folder} holds no checkpoint that can be read"):
        return AutoConfig.from_pretrained(folder, **_OWN_CODE_ONLY)


def _dtype(device: torch.device) -> torch.dtype:
    if device.type == "cuda" and not torch.cuda.is_bf16_supported():
        return torch.float16
    return torch.bfloat16


def _resolve_quantization(wanted: str, config: Any, device: torch.device) -> tuple[str, BitsAndBytesConfig | None]:
    carried = getattr(config, "quantization_config", None)
    if carried is not None:
        carried = carried if isinstance(carried, dict) else carried.to_dict()
        name = _carried_name(carried)
        if "quant_method" not in carried:
            raise ConfigurationError("the checkpoint is quantized, and its config.json does not say by which method")
        # The library would load the weights of a method that it does not know as if they were plain.
        if not AutoHfQuantizer.supports_quant_method(carried):
            raise ConfigurationError(
                f"the checkpoint is quantized by {name}, which the Transformers library cannot read"
            )
        if wanted not in ("auto", name):
            raise ConfigurationError(
                f"MODEL_QUANTIZATION={wanted}: the checkpoint is quantized already ({name}); use auto"
            )
        return name, None
    resolved = "nf4" if wanted == "auto" else wanted
    match resolved:
        case "none":
            return resolved, None
        case "int8":
            return resolved, BitsAndBytesConfig(load_in_8bit=True)
        case _:
            return resolved, BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=resolved,
                bnb_4bit_compute_dtype=_dtype(device),
            )


def quantization_that_fits(folder: Path, free_bytes: int, slots: int) -> tuple[str, str]:
    """`none` (bf16) if the weights in `folder` and a cache for `slots` requests of USUAL_CONTEXT fit into `free_bytes`
    of a GPU by the arithmetic of `forebay plan`, else `nf4`; and why."""
    try:
        shape = of_folder(folder.name, folder)
    except ConfigurationError as exc:
        return "nf4", f"it is not known how much memory bf16 takes ({exc})"
    context = min(USUAL_CONTEXT, shape.context_length)
    # What is free already is without CUDA's own part.
    plan = fit(shape, free_bytes + RESERVE_BYTES, "none", context, requests_per_slot=1, max_slots=slots, flash=False)
    enough = plan.slots >= min(slots, MAX_SLOTS) and plan.context >= context
    needed, free = weights_bytes(shape, "none") / (1 << 30), free_bytes / (1 << 30)
    what = f"{needed:.1f} GiB of weights in bf16 and a cache for {slots} requests of {context} tokens"
    return ("none" if enough else "nf4"), f"{what} {'fit' if enough else 'do not fit'} into {free:.1f} GiB"


def _carried_name(carried: dict[str, Any]) -> str:
    if carried.get("load_in_8bit"):
        return "int8"
    if carried.get("load_in_4bit"):
        return str(carried.get("bnb_4bit_quant_type", "fp4"))
    return str(carried.get("quant_method", "quantized")).rsplit(".", 1)[-1].lower()


def _context_length(config: Any) -> int:
    text = config.get_text_config()
    lengths = [value for name in _CONTEXT_FIELDS if isinstance(value := getattr(text, name, None), int)]
    if not lengths:
        raise ConfigurationError("the checkpoint's config.json does not say how long its context is")
    return lengths[0]


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    ids: set[int] = set()
    for value in (model.generation_config.eos_token_id, tokenizer.eos_token_id):
        ids.update(value if isinstance(value, list) else [] if value is None else [value])
    return frozenset(ids)
