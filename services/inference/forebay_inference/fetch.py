"""`python -m forebay_inference.fetch [LINK]`: fetch and convert the model into DATA_DIR; for an init container."""

import os
import sys
from pathlib import Path

from forebay_contracts import extras, program
from forebay_contracts.settings import InferenceSettings, load
from forebay_contracts.wire.errors import ConfigurationError
from forebay_inference.models.adapters import Kind, ensure_adapters
from forebay_inference.models.store import ensure_gguf, ensure_model


def fetch(link: Path | None = None) -> None:
    """Fetch what the worker would, and make `link` a symbolic link to it, relative so that it holds in other mounts."""
    settings = load(InferenceSettings)
    if settings.inference_engine in ("simulated", "openai"):
        print(f"the {settings.inference_engine} engine has no model")
        return
    extras.require(settings.inference_engine)
    ensure = ensure_gguf if settings.inference_engine == "llamacpp" else ensure_model
    place = ensure(settings.default_model, settings.data_dir, _tell, settings.hf_token)
    if link is not None and link.resolve() != place.resolve():
        try:
            link.unlink(missing_ok=True)
            link.symlink_to(os.path.relpath(place, link.parent))
        except OSError as exc:  # it names the place to which the link would lead
            raise ConfigurationError(f"--link {link} cannot be made: {(exc.strerror or str(exc)).lower()}") from exc
    print(f"{settings.served_model} is in {place}")
    kind: Kind = "gguf" if settings.inference_engine == "llamacpp" else "checkpoint"
    for name, adapter in ensure_adapters(settings, kind, _tell).items():
        print(f"{settings.served_model}:{name} is in {adapter}")


def _tell(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(
        program.run(
            lambda: fetch(*map(Path, sys.argv[1:])), lambda text: print(f"forebay fetch: {text}", file=sys.stderr)
        )
    )
