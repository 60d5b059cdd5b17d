"""What is the same of vLLM's server whatever it serves: its command, what it says of itself, its load."""

from collections.abc import Mapping, Sequence
from glob import glob
from typing import Any, Final

from forebay_contracts.settings import InferenceSettings
from forebay_contracts.wire.errors import ConfigurationError
from forebay_inference.engine.machine import available_memory
from forebay_inference.engine.protocol import Tokenizer
from forebay_inference.engine.served.dialect import PROBE, Load, NotReady, Served
from forebay_inference.engine.served.http import Http, ServerFailed
from forebay_inference.engine.served.metrics import samples

OLDEST: Final = (0, 12)
"""The first version with `structured_outputs`."""

_ACCELERATORS: Final = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/dxg")
_CACHE_PART: Final = 4
"""On a CPU, one in so many of the bytes free. vLLM itself takes nine tenths of the machine's memory there."""


def command(settings: InferenceSettings, *options: str) -> Sequence[str]:
    """What starts the server of the package `vllm`; raises ConfigurationError for a quantization it does not make."""
    made = {"auto": (), "none": (), "nf4": ("--quantization", "bitsandbytes")}
    if (wanted := settings.model_quantization) not in made:
        raise ConfigurationError(f"MODEL_QUANTIZATION={wanted} cannot be had from vLLM: use auto, none or nf4")
    cache = ("--kv-cache-memory-bytes", str(available_memory() // _CACHE_PART))
    return [
        *("{python}", "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", "{model}", "--served-model-name", "{name}", "--host", "127.0.0.1", "--port", "{port}"),
        *("--max-num-seqs", "{slots}", "--max-model-len", "auto", *options, "--disable-uvicorn-access-log"),
        *made[wanted],
        *(cache if on_cpu(settings) else ()),
    ]


def on_cpu(settings: InferenceSettings) -> bool:
    """Whether a server that the worker starts computes on the CPU."""
    return settings.model_device == "cpu" or not any(map(glob, _ACCELERATORS))


async def identified(
    http: Http, tokenizer: Tokenizer, *, special_tokens: bool = False
) -> tuple[Served, Sequence[Mapping[str, Any]]]:
    """What the server says that it serves, and the models that it lists; see `ServerDialect.identify`."""
    try:
        await http.get("/health")
        version = str((await http.json("/version"))["version"])
        models = (await http.json("/v1/models"))["data"]
        cut = await http.json("/tokenize", {"prompt": PROBE, "add_special_tokens": special_tokens})
        served = Served(version, tokenizer.vocabulary_size, int(models[0]["max_model_len"]), "vLLM's")
        same = cut["tokens"] == tokenizer.encode(PROBE, special_tokens=special_tokens)
    except ServerFailed as exc:
        if exc.status is not None and exc.status < 500:
            raise ConfigurationError(f"the server at {http.url}: {exc}") from exc
        raise NotReady(str(exc)) from exc
    except (LookupError, TypeError, ValueError, AttributeError) as exc:
        raise ConfigurationError(f"the server at {http.url} does not answer like vLLM: {exc!r}") from exc
    if _numbers(version) < OLDEST:
        raise ConfigurationError(f"vLLM {version} is too old: Forebay needs {'.'.join(map(str, OLDEST))} or newer")
    if not same:
        raise ConfigurationError(f"the server at {http.url} serves a model with another tokenizer")
    return served, models


async def load(http: Http) -> Load:
    """See `ServerDialect.load`. Several engines of one server count together."""
    found = samples(await http.get("/metrics"), ("vllm:iteration_tokens_total_count", "vllm:kv_cache_usage_perc"))
    usage = found["vllm:kv_cache_usage_perc"]
    return Load(int(sum(found["vllm:iteration_tokens_total_count"])), max(usage) if usage else None)


def _numbers(version: str) -> tuple[int, ...]:
    parts = version.split("+")[0].split(".")
    return tuple(int("".join(filter(str.isdigit, part)) or 0) for part in parts[:2])
