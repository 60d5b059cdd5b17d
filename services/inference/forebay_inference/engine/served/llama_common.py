"""What is the same of llama.cpp's server whatever it serves: its command, what it says of itself, its load."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

from forebay_contracts.settings import InferenceSettings
from forebay_contracts.wire.errors import ConfigurationError
from forebay_inference.engine.protocol import Tokenizer
from forebay_inference.engine.served.dialect import PROBE, Load, NotReady, Served
from forebay_inference.engine.served.http import Http, ServerFailed

MAX_SLOTS: Final = 256
"""Sequences that llama.cpp computes at once (LLAMA_MAX_SEQ)."""


def command(settings: InferenceSettings, *options: str) -> Sequence[str]:
    """What starts the server of the wheel `xllamacpp`, in a process of its own."""
    if settings.slots > MAX_SLOTS:
        raise ConfigurationError(f"llama.cpp runs at most {MAX_SLOTS} requests at once: set WORKER_SLOTS")
    if settings.model_quantization != "auto":
        wanted = settings.model_quantization
        raise ConfigurationError(f"MODEL_QUANTIZATION={wanted}: a GGUF file has its own quantization; use auto")
    server = ["{python}", "-m", "forebay_inference.engine.served.llama_server"]
    return [*server, "{model}", "--port={port}", "--slots={slots}", f"--batch={settings.llm_batch_size}", *options]


async def facts(http: Http, tokenizer: Tokenizer, *, special_tokens: bool = False) -> Served:
    """What the server says that it serves; it must cut a text as `tokenizer` does. To be asked in `explained`."""
    await http.get("/health")
    props = await http.json("/props")
    (model,) = (await http.json("/v1/models"))["data"]
    cut = await http.json("/tokenize", {"content": PROBE, "add_special": special_tokens, "parse_special": False})
    if cut["tokens"] != tokenizer.encode(PROBE, special_tokens=special_tokens):
        raise ConfigurationError(f"the server at {http.url} serves a model with another tokenizer")
    await load(http)
    return Served(
        props["build_info"],
        model["meta"]["n_vocab"],
        props["default_generation_settings"]["n_ctx"],
        str(props.get("model_ftype") or "gguf").split()[-1],
        slots=props["total_slots"],
    )


@asynccontextmanager
async def explained(http: Http) -> AsyncIterator[None]:
    """Turns what fails while the server is asked about itself into NotReady or ConfigurationError."""
    try:
        yield
    except ServerFailed as exc:
        if exc.status in (None, 503):
            raise NotReady("it loads the model" if exc.status else str(exc)) from exc
        hint = "; start it with --metrics" if "/metrics" in str(exc) else ""
        raise ConfigurationError(f"the server at {http.url}: {exc}{hint}") from exc
    except (LookupError, TypeError, ValueError, AttributeError) as exc:
        raise ConfigurationError(
            f"the server at {http.url} does not answer like a llama-server that Forebay knows: {exc!r}"
        ) from exc


async def load(http: Http) -> Load:
    """See `ServerDialect.load`."""
    for line in (await http.get("/metrics")).splitlines():
        if line.startswith(b"llamacpp:n_decode_total "):
            return Load(int(float(line.split()[1])))
    raise ServerFailed("/metrics does not tell n_decode_total")
