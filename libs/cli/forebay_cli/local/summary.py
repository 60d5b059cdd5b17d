"""What `forebay up` prints once it is ready: where everything is, and a request to copy."""

import json
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from forebay_contracts.wire.heartbeats import WorkerInfo
from forebay_contracts.wire.request import CompletionType

_EXAMPLES: Final[Mapping[CompletionType, tuple[str, dict[str, Any]]]] = {
    CompletionType.CHAT: ("chat/completions", {"messages": [{"role": "user", "content": "Hello"}]}),
    CompletionType.COMPLETION: ("completions", {"prompt": "Hello"}),
    CompletionType.EMBEDDING: ("embeddings", {"input": "Hello"}),
    CompletionType.RERANK: ("rerank", {"query": "Hello", "documents": ["Good morning", "Good night"]}),
}
"""The path and body of a request of each type, the most usual type first."""


def lines(url: str, nats_url: str, data_dir: Path, workers: Sequence[WorkerInfo], *, has_keys: bool) -> list[str]:
    """The lines of the summary."""
    context = data_dir / "nats" / "context.json"
    found = {
        "page": f"{url}/",
        "models": "\n          ".join(_models(workers)),
        "NATS": nats_url + (f"  (NATS_CONTEXT={context})" if context.exists() else ""),
        "chat": f"forebay chat --base-url {url}",
        "try it": curl(url, workers[0], has_keys=has_keys),
    }
    return [f"  {name:6}  {text}" for name, text in found.items()]


def _models(workers: Iterable[WorkerInfo]) -> list[str]:
    """Each model, and how many of which workers it has."""
    counted = Counter((one.model, one.engine, one.quantization, one.device) for one in workers)
    return [
        f"{model}  ({count} worker{'' if count == 1 else 's'}: {' '.join(filter(None, what)).replace(' none', '')})"
        for (model, *what), count in counted.items()
    ]


def curl(url: str, worker: WorkerInfo, *, has_keys: bool) -> str:
    """A command that asks the model of `worker`."""
    path, body = next(example for kind, example in _EXAMPLES.items() if kind in worker.completion_types)
    key = ' -H "Authorization: Bearer $API_KEY"' if has_keys else ""
    data = shlex.quote(json.dumps({"model": worker.model} | body))
    return f"curl {url}/v1/{path} -H 'Content-Type: application/json'{key} -d {data}"
