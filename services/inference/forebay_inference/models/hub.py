"""Checkpoints of a model hub: which files of a repository are the checkpoint, and fetching them.

A repository often has the same weights several times: as safetensors, in PyTorch's format, for other frameworks, and in
the format of those who trained the model (`original/`, `consolidated*`). Only what Transformers and
sentence-transformers load is fetched.
"""

import json
import re
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path
from typing import Any, Final

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils.tqdm import disable_progress_bars

from forebay_contracts.wire.errors import ConfigurationError
from forebay_inference.models.progress import step_progress
from forebay_inference.models.room import clause, require_room
from forebay_inference.models.sources import bytes_in

_TIMEOUT_S: Final = 5
_POLL_S: Final = 0.5

_TEXTS: Final = ("*.json", "*.jinja", "*.model", "tokenizer*", "*.txt")
"""Configuration, tokenizer and chat template, by name."""

_FOLDERS: Final = re.compile(r"(\d+_[^/]+|additional_chat_templates)/")
"""The folders that belong to a checkpoint: the modules of sentence-transformers (`1_Pooling`), and chat templates."""

_WEIGHTS: Final = ("model.safetensors", "pytorch_model.bin")
"""The names of weights that the libraries load, the best first. They load the second with `weights_only`, which runs
no code of the file. Weights in several files have an index, `NAME.index.json`."""

Read = Callable[[str], str | bytes]
"""The content of a file of the repository, by its name."""

Choose = Callable[[Collection[str], Read], list[str]]
"""Which of the files of a repository are needed; none if it has not what is wanted."""

_PART: Final = re.compile(r"-(\d{5})-of-\d{5}(?=\.gguf$)")


def checkpoint_files(names: Collection[str], read: Read) -> list[str]:
    """The files of a repository that are the checkpoint; empty if it has no weights that could be loaded.

    Raises:
        ConfigurationError: an index of weights cannot be read.
    """
    folders = {"", *(found[0] for name in names if (found := _FOLDERS.match(name)))}
    weights = [name for folder in folders for name in _weights(folder, names, read)]
    if "config.json" not in names or not weights:
        return []
    texts = [name for name in names if _is_text(name, folders)]
    return sorted({*texts, *weights})


def files_beside_weights(names: Collection[str], read: Read) -> list[str]:
    """What a worker needs whose inference server has loaded the weights. Where not all of it has its usual name, the
    whole checkpoint."""
    if {"config.json", "generation_config.json", "tokenizer.json"}.issubset(names):
        return sorted(name for name in names if _is_text(name, {"", "additional_chat_templates/"}))
    return checkpoint_files(names, read)


def _is_text(name: str, folders: Collection[str]) -> bool:
    folder, _, base = name.rpartition("/")
    in_checkpoint = (folder and f"{folder}/") in folders and not base.startswith("consolidated")
    return in_checkpoint and any(fnmatchcase(base, pattern) for pattern in _TEXTS)


def _weights(folder: str, names: Collection[str], read: Read) -> list[str]:
    for name in (folder + weights for weights in _WEIGHTS):
        if name in names:
            return [name]
        if (index := name + ".index.json") in names:
            try:
                return [index, *{folder + part for part in json.loads(read(index))["weight_map"].values()}]
            except (ValueError, KeyError, TypeError, AttributeError) as exc:
                raise ConfigurationError(f"{index} is no index of weights: {exc!r}") from exc
    return []


def gguf_files(names: Collection[str], wanted: str) -> list[str]:
    """The GGUF file `wanted` of a repository, with its other parts if it has some; with `wanted` empty, the only one.

    Raises:
        ConfigurationError: there are several, or none.
    """
    found = sorted(name for name in names if name.endswith(".gguf") and not Path(name).name.startswith("mmproj"))
    wholes = [name for name in found if (part := _PART.search(name)) is None or int(part[1]) == 1]
    if wanted:
        wholes = [name for name in wholes if name == wanted]
    if len(wholes) != 1:
        there = ", ".join(found) or "none"
        raise ConfigurationError(f"name one of its GGUF files, as OWNER/NAME/FILE.gguf; it has {there}")
    stem = _PART.sub("", wholes[0])
    return [name for name in found if _PART.sub("", name) == stem]


def download_gguf(model: str, folder: Path, progress: Callable[[str], None], token: str | None = None) -> Path:
    """The GGUF file of `model`, `OWNER/NAME` or `OWNER/NAME/FILE.gguf`; the first one if it has several parts. See
    `download_from_hub`."""
    owner, name, *rest = model.split("/")
    repository, wanted = f"{owner}/{name}", "/".join(rest)

    def choose(names: Collection[str], read: Read) -> list[str]:
        return gguf_files(names, wanted)

    place = download_from_hub(repository, folder, progress, token, choose)
    names = {str(path.relative_to(place)) for path in place.rglob("*.gguf")}
    return place / gguf_files(names, wanted)[0]


def download_from_hub(
    model: str,
    folder: Path,
    progress: Callable[[str], None],
    token: str | None = None,
    choose: Choose = checkpoint_files,
) -> Path:
    """The folder of hub id `model` with the files that `choose` takes: from the hub client's own cache, else fetched
    into `folder`.

    Where the hub cannot be asked, what an earlier start has fetched into `folder` is used.

    Raises:
        ConfigurationError: the hub does not have it or does not give it, or cannot be reached; or the disk is full.
    """
    try:
        if (cached := _cached(model, None, choose)) is not None:
            return cached
        return _fetched(model, folder, progress, token, choose)
    except HFValidationError as exc:
        raise ConfigurationError(f"DEFAULT_MODEL={model}: neither a local path nor a hub id ({exc})") from exc
    except ConfigurationError as exc:
        raise ConfigurationError(f"DEFAULT_MODEL={model}: {exc}") from exc
    except Exception as exc:  # the client raises many kinds: connection, authorization, not found
        reason = _reason(model, exc)
        if (earlier := _cached(model, folder, choose)) is not None:
            progress(f"{reason}; using {model} as an earlier start has fetched it")
            return earlier
        raise ConfigurationError(f"DEFAULT_MODEL={model} could not be fetched: {reason}") from exc


def _cached(model: str, cache: Path | None, choose: Choose) -> Path | None:
    """The folder of `model` in a cache (None: the hub client's own), if all that `choose` takes is there."""
    repository = Path(cache or constants.HF_HUB_CACHE) / f"models--{model.replace('/', '--')}"
    try:
        folder = repository / "snapshots" / (repository / "refs" / "main").read_text()
    except OSError:
        return None
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    try:
        files = choose(names, lambda name: (folder / name).read_bytes())
    except ConfigurationError:
        return None
    return folder if files and names.issuperset(files) else None


def _fetched(model: str, folder: Path, progress: Callable[[str], None], token: str | None, choose: Choose) -> Path:
    progress(f"fetching {model} from the model hub")
    disable_progress_bars()
    common: dict[str, Any] = {"cache_dir": folder, "token": token, "etag_timeout": _TIMEOUT_S}
    known = HfApi(token=token).model_info(model, timeout=_TIMEOUT_S, files_metadata=True)
    sizes = {file.rfilename: file.size or 0 for file in known.siblings or ()}
    files = choose(sizes, lambda name: Path(hf_hub_download(model, name, **common)).read_bytes())
    if not files:
        raise ConfigurationError(_nothing_to_load(sizes))
    if missing := set(files) - sizes.keys():
        raise ConfigurationError(f"its index names weights that the hub does not have: {', '.join(sorted(missing))}")
    blobs = folder / f"models--{model.replace('/', '--')}" / "blobs"
    total = sum(sizes[name] for name in files)
    require_room(folder, total - bytes_in(blobs))

    def look() -> None:
        # The files of another revision count too.
        step(min(99, 100 * bytes_in(blobs) / max(total, 1)))

    with step_progress(f"fetching {model}", progress) as step, _polled(look):
        return Path(snapshot_download(model, allow_patterns=[escape(name) for name in files], max_workers=4, **common))


def _nothing_to_load(names: Collection[str]) -> str:
    if any(name.endswith(".gguf") for name in names):
        return "the hub has it as GGUF: download one of its .gguf files, and give its path"
    if "adapter_config.json" in names:
        return "it is an adapter and no whole model: merge it into its base model, and give the folder"
    return f"the hub has no checkpoint there: config.json with {' or '.join(_WEIGHTS)}"


@contextmanager
def _polled(look: Callable[[], None]) -> Iterator[None]:
    """Call `look` from a thread until the block ends."""
    done = threading.Event()

    def poll() -> None:
        while not done.wait(_POLL_S):
            look()

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _reason(model: str, error: Exception) -> str:
    """The error of the hub's client as a sentence that says what to do."""
    if isinstance(error, GatedRepoError):
        page = f"{constants.ENDPOINT}/{model}"
        return f"it is gated: accept its terms at {page}, and set HF_TOKEN to a token of that account"
    if isinstance(error, RepositoryNotFoundError):
        return "the hub has no such model, or it is private and HF_TOKEN is not set to a token that may read it"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return "the hub does not accept HF_TOKEN" if status == 401 else f"the hub answered with status {status}"
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'DATA_DIR'}: {clause(error.strerror)}"
    cause = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if "disk space" in cause:  # as the hub's client says it, without an errno
        return clause(cause)
    return (
        f"the model hub at {constants.ENDPOINT} cannot be reached ({cause}); "
        "give a local folder or GGUF file as DEFAULT_MODEL where there is no hub"
    )
