"""`python -m forebay_inference.fetch`: fetch and convert the model into DATA_DIR, and end; for an init container."""

import sys

from forebay_contracts.settings import InferenceSettings, load
from forebay_contracts.wire.errors import ForebayError
from forebay_inference.models.store import ensure_model


def main() -> int:
    """Fetch what the worker would; the exit status."""
    try:
        settings = load(InferenceSettings)
        if settings.inference_engine == "simulated":
            print("the simulated engine has no model")
        else:
            folder = ensure_model(settings.default_model, settings.data_dir, lambda line: print(line, flush=True))
            print(f"{settings.served_model} is in {folder}")
    except ForebayError as exc:
        print(f"forebay fetch: {exc}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
