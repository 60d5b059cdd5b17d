"""Writes docs/reference from the code: settings, endpoints, errors, metrics and commands."""

import inspect
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

import forebay_api.request_metrics
import forebay_inference.worker_metrics
from forebay_api import app
from forebay_api.http.errors import ANSWERS
from forebay_api.in_flight.answer import ClientLeft, SlowReader
from forebay_api.watching.exposition import QueueGauges
from forebay_cli import main as command_line
from forebay_contracts.settings import ApiSettings, InferenceSettings
from forebay_contracts.telemetry.metrics import REGISTRY
from forebay_contracts.wire import errors

ROOT: Final = Path(__file__).parents[1]
FOLDER: Final = ROOT / "docs" / "reference"
UNSEEN: Final = (errors.QueueConflict, SlowReader, ClientLeft)
"""Errors that reach no client."""
_BAD_BODY: Final = (
    "The body is invalid, or asks for what is not supported; `param` names the field. "
    "`context_length_exceeded`: prompt and answer are longer than the context."
)
_UNEXPECTED: Final = "Something unexpected. The api's log has it, with the id of the request."


def main() -> None:
    """Write the pages."""
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text)


def pages() -> dict[str, str]:
    """The text of each page, by the name of its file."""
    made = {
        "settings.md": settings(),
        "endpoints.md": endpoints(),
        "errors.md": error_codes(),
        "metrics.md": metrics(),
        "commands.md": commands(),
    }
    return {name: "\n".join(lines) + "\n" for name, lines in made.items()}


def settings() -> Iterator[str]:
    """Every setting: its default and values from the class, its section and purpose from the example."""
    yield from _head(
        "Settings",
        "Settings come from the environment and from `.env`; the environment wins. An empty value means the default. "
        "Conflicting settings stop the start with an error. "
        "[`queue-config.env.example`](../../queue-config.env.example) has all of them as a file to start from. "
        'The column "of" says which service reads the setting: the api, a worker, or both.',
    )
    classes = {"api": ApiSettings.model_fields, "worker": InferenceSettings.model_fields}
    comment = ""
    for line in (ROOT / "queue-config.env.example").read_text().splitlines():
        if section := re.fullmatch(r"# --- (.+) ---", line):
            if section[1] == "Three set-ups":
                return
            yield from (
                "",
                f"## {section[1]}",
                "",
                "| setting | default | values | of | |",
                "| --- | --- | --- | --- | --- |",
            )
        elif line.startswith("# "):
            comment = line[2:]
        elif name := re.match(r"[A-Z_]+(?==)", line):
            readers = [service for service, known in classes.items() if name[0].lower() in known]
            field = classes[readers[0]][name[0].lower()]
            of = "both" if len(readers) == 2 else readers[0]
            yield _row(f"`{name[0]}`", _default(field, line), _values(field), of, _text(comment))


def _default(field: FieldInfo, line: str) -> str:
    given = line.partition("=")[2]
    return f"`{given}`" if given else ""


def _values(field: FieldInfo) -> str:
    kind, least, most = field.annotation, None, None
    if get_origin(kind) is types.UnionType:
        kind = next(arm for arm in get_args(kind) if arm is not type(None))
    for rule in field.metadata:
        least, most = getattr(rule, "ge", least), getattr(rule, "le", most)
    if get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(kind))
    if kind is bool:
        return "`true`, `false`"
    if least is not None:
        return f"{least:,} to {most:,}" if most is not None else f"at least {least:,}"
    return "a path" if kind is Path else ""


def endpoints() -> Iterator[str]:
    """Every path of the OpenAPI document, by its tag."""
    yield from _head(
        "Endpoints",
        "An api describes them at `/docs`, with the schemas of bodies and answers, and in `/openapi.json`. "
        "Paths under `/v1` need [a key](../security.md#access) if the api has keys. "
        "Parameters: [chat completions, completions](../engine.md#parameters), [responses](../responses.md), "
        "[messages](../messages.md), [embeddings](../models.md#embeddings), [reranking](../models.md#reranking).",
    )
    context = types.SimpleNamespace(settings=ApiSettings(_env_file=None))
    served = app.create_app(context)
    while not hasattr(served, "_rest"):
        served = served._app
    found: dict[str, list[str]] = {}
    for path, operations in served._rest.openapi()["paths"].items():
        for method, operation in operations.items():
            (tag, *_) = operation.get("tags") or ["other"]
            said = operation.get("description") or operation.get("summary", "")
            found.setdefault(tag, []).append(_row(f"`{method.upper()} {path}`", _sentence(said)))
    for tag, rows in found.items():
        yield from ("", f"## {tag.capitalize()}", "", "| endpoint | |", "| --- | --- |", *rows)


def error_codes() -> Iterator[str]:
    """Every class of error that a client can get, by its status."""
    yield from _head(
        "Errors",
        'Every error has OpenAI\'s shape, `{"error": {"message", "type", "param", "code"}}`. If a stream fails after '
        "it has begun, its last event is such an error, and `[DONE]` does not follow. [Messages](../messages.md) have "
        "Anthropic's shape and statuses. [Why clients get 503 or 408](../troubleshooting.md) says what to do.",
        'OpenAI\'s SDKs retry 408, 409, 429 and 5xx by themselves. "Again" is the header `x-should-retry`, which they '
        "follow. `Retry-After` comes with `queue_full`, `answer_log_full`, `waiting_room_full` and "
        "`rate_limit_exceeded`.",
    )
    yield from ("", "| HTTP | `error.code` | `error.type` | when | again |", "| --- | --- | --- | --- | --- |")
    yield _row("400", "OpenAI's own, or null", "`invalid_request_error`", _BAD_BODY, "")
    for kind in sorted(_seen(), key=lambda kind: (kind.status, str(kind.code), len(kind.__mro__))):
        yield _row(str(kind.status), f"`{kind.code}`", f"`{kind.type}`", _meaning(kind), _again(kind))
    yield _row("500", "null", "`server_error`", _UNEXPECTED, "no")


def _again(kind: type[errors.ApiError]) -> str:
    row = next((ANSWERS[base] for base in kind.__mro__ if base in ANSWERS), None)
    return {True: "yes", False: "no", None: ""}[row.should_retry if row else None]


def _seen(kind: type[errors.ApiError] = errors.ApiError) -> Iterator[type[errors.ApiError]]:
    """The classes that say something of their own to a client."""
    for child in kind.__subclasses__():
        if child not in UNSEEN and child.__module__.startswith("forebay_"):
            if child.code and (child in ANSWERS or {"code", "type"} & child.__dict__.keys()):
                yield child
            yield from _seen(child)


def _meaning(kind: type[Any]) -> str:
    return _text(" ".join(inspect.cleandoc(kind.__doc__ or "").split("\n\n")[0].split()))


def metrics() -> Iterator[str]:
    """Every metric of both services."""
    yield from _head(
        "Metrics",
        "The api has them at `/metrics`, a worker at `/metrics` of `METRICS_PORT`. "
        "[Monitor](../observability.md) says how to scrape and to read them, and has alerts and a dashboard.",
    )
    yield from ("", "| metric | type | labels | of | |", "| --- | --- | --- | --- | --- |")
    owners = REGISTRY._names_to_collectors
    of = {"api": forebay_api.request_metrics, "worker": forebay_inference.worker_metrics}
    rows = []
    for family in (family for family in REGISTRY.collect() if family.name.startswith("forebay_")):
        owner = owners[family.name]
        service = [name for name, module in of.items() if any(value is owner for value in vars(module).values())]
        rows.append((family, owner._labelnames, service[0] if service else "both"))
    rows += [(family, family._labelnames, "api") for family in QueueGauges().collect()]
    for family, labels, service in sorted(rows, key=lambda row: (row[2], row[0].name)):
        name = family.name + ("_total" if family.type == "counter" else "")
        yield _row(f"`{name}`", family.type, ", ".join(labels), service, _text(family.documentation))
    reasons = dict.fromkeys(f"`{row.rejection}`" for row in ANSWERS.values() if row.rejection)
    yield from ("", f"Values of `reason`: {', '.join(reasons)}.")


def commands() -> Iterator[str]:
    """Every command of `forebay`, with its arguments and options."""
    yield from _head(
        "Commands",
        "`forebay COMMAND --help` prints the same. The exit code is 0 for success, 1 for a failure and 2 for invalid "
        "settings or options. An error is one sentence on stderr. `forebay --install-completion` completes commands "
        "and options in your shell.",
        "Which NATS server does a command ask? The one that `--nats-url` names, else the `forebay up` that runs on "
        "`--data-dir`, else `NATS_URL`, else the `forebay up` that runs on `DATA_DIR`. `chat` and `retry` ask an api: "
        "`--base-url`, else `--data-dir`, else `API_HOST` and `API_PORT`, else that of `forebay up`. Each command "
        "names the server on stderr. If nothing names one, a command that changes something ends with exit code 2, and "
        "the others ask 127.0.0.1:4222 or :8091.",
    )
    for name, (_, summary) in command_line.COMMANDS.items():
        command = command_line.load(name)
        yield from ("", f"## forebay {name}", "", _text(summary))
        for words, one in _commands(name, command):
            if words != name:
                yield from ("", f"### forebay {words}", "", _text(one.get_short_help_str(200)))
            shown = [
                (_words_of(param), param.help or "") for param in one.params if not getattr(param, "hidden", False)
            ]
            if shown:
                yield from ("", "| | |", "| --- | --- |", *(_row(f"`{words}`", _text(said)) for words, said in shown))


def _commands(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    yield name, command
    for child, one in getattr(command, "commands", {}).items():
        yield from _commands(f"{name} {child}", one)


def _words_of(param: Any) -> str:
    metavar = param.metavar or str(param.name).upper()
    if param.param_type_name == "argument":
        return metavar
    return ", ".join([*param.opts, *param.secondary_opts]) + ("" if param.is_flag else f" {metavar}")


def _head(title: str, *paragraphs: str) -> Iterator[str]:
    yield f"# {title}"
    for paragraph in paragraphs:
        yield from ("", paragraph)
    yield from ("", "<!-- scripts/reference.py writes this page. -->")


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _sentence(text: str) -> str:
    return _text(" ".join(text.split("\n\n")[0].split()))


def _text(text: str) -> str:
    """Prose of the code as Markdown."""
    text = re.sub(r"\bdocs/([\w-]+)\.md", r"[\1](../\1.md)", text)
    return re.sub(r"(?<![`\w])([A-Z]{2,}(?:_[A-Z]+)+)(?![`\w])", r"`\1`", text)


if __name__ == "__main__":
    main()
