"""`python -m forebay_inference.fetch`: fetch and convert the model into DATA_DIR, and end; for an init container."""

import sys

from forebay_contracts import program
from forebay_contracts.settings import InferenceSettings, load
from forebay_inference.models.adapters import Kind, ensure_adapters
from forebay_inference.models.store import ensure_gguf, ensure_model


def fetch() -> None:
    """Fetch what the worker would."""
    settings = load(InferenceSettings)
    if settings.inference_engine in ("simulated", "openai"):
        print(f"the {settings.inference_engine} engine has no model")
        return
    ensure = ensure_gguf if settings.inference_engine == "llamacpp" else ensure_model
    place = ensure(settings.default_model, settings.data_dir, _tell, settings.hf_token)
    print(f"{settings.served_model} is in {place}")
    kind: Kind = "gguf" if settings.inference_engine == "llamacpp" else "checkpoint"
    for name, adapter in ensure_adapters(settings, kind, _tell).items():
        print(f"{settings.served_model}:{name} is in {adapter}")


def _tell(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(program.run(fetch, lambda text: print(f"forebay fetch: {text}", file=sys.stderr)))
