"""The command line: options in, the right module called, errors as one sentence."""

import asyncio
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from forebay_cli import console
from forebay_cli.commands import chat as chatting
from forebay_cli.commands import plan as planning
from forebay_cli.commands import requests as asking
from forebay_cli.commands import status as looking
from forebay_cli.commands import steer
from forebay_cli.commands import topology as shaping
from forebay_cli.commands import up as bringing_up
from forebay_cli.doctor import checks as checking
from forebay_contracts import keys
from forebay_contracts.settings import ApiSettings, Settings, load
from forebay_contracts.version import VERSION
from forebay_contracts.wire.errors import ConfigurationError, ForebayError
from forebay_contracts.wire.state import RequestStatus

EXIT_FAILED = 1
EXIT_CONFIGURATION = 2

app = typer.Typer(
    help="OpenAI-compatible inference behind a durable NATS JetStream queue.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
topology = typer.Typer(help="Streams, consumers and buckets on NATS.", no_args_is_help=True)
app.add_typer(topology, name="topology")

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def main() -> None:
    """Run `forebay`: exit code 2 for a wrong configuration or usage, 1 for any other failure."""
    # At each end of a TLS connection asyncio warns of what nats-py's transport returns: nothing that a user could cure.
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    try:
        app()
    except ConfigurationError as exc:
        console.fail(str(exc))
        sys.exit(EXIT_CONFIGURATION)
    except ForebayError as exc:
        console.fail(str(exc))
        sys.exit(EXIT_FAILED)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        console.stdout.print(VERSION)
        raise typer.Exit


@app.command()
def up(
    host: Annotated[str | None, typer.Option(help="Address of the api (API_HOST).", show_default="127.0.0.1")] = None,
    port: Annotated[
        int | None, typer.Option(help="Port of the api (API_PORT).", show_default="8091", min=0, max=65_535)
    ] = None,
    workers: Annotated[int, typer.Option(help="Worker processes.", min=1, max=64)] = 1,
    engine: Annotated[
        str | None,
        typer.Option(help="transformers, embedding, simulated (INFERENCE_ENGINE).", show_default="transformers"),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Models, the NATS store, logs (DATA_DIR).", show_default="~/.cache/forebay"),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show every log line of every process.")] = False,
) -> None:
    """Start everything on this machine: nats-server (unless NATS_URL is set), api, workers.

    Prints `ready http://HOST:PORT` once requests are answered. SIGINT and SIGTERM let running requests end.
    """
    options = bringing_up.Options(host, port, workers, engine, data_dir, verbose)
    raise typer.Exit(asyncio.run(bringing_up.run(options)))


@app.command()
def api() -> None:
    """Run the api in the foreground, as a container does."""
    _become("forebay_api")


@app.command()
def inference() -> None:
    """Run one worker in the foreground, as a container does."""
    _become("forebay_inference")


@app.command()
def fetch() -> None:
    """Fetch and convert the model into DATA_DIR, and end: before the first worker, or in an init container."""
    _become("forebay_inference.fetch")


@app.command()
def status(
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Look again every second; waits for a NATS that goes away meanwhile.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show the queue's numbers and the workers."""
    asyncio.run(looking.status(watch=watch, as_json=as_json))


@app.command()
def requests(
    status: Annotated[RequestStatus | None, typer.Option(help="Only those in this state.")] = None,
    model: Annotated[str | None, typer.Option(help="Only those of this model: its name, or the end of it.")] = None,
    since: Annotated[str | None, typer.Option(help="Only those queued within the last 90s, 10m, 2h.")] = None,
    request_id: Annotated[str | None, typer.Option("--id", help="Only this one.")] = None,
    limit: Annotated[int, typer.Option(help="At most so many.", min=1, max=10_000)] = 20,
    as_json: AsJson = False,
) -> None:
    """Show the newest requests and what became of them."""
    wanted = asking.Filter(status, model, None if since is None else steer.duration_s(since), request_id)
    asyncio.run(asking.requests(wanted, limit=limit, as_json=as_json))


@app.command()
def cancel(request_id: Annotated[str, typer.Argument(metavar="ID")], as_json: AsJson = False) -> None:
    """Call a request off, waiting or running; exit code 1 if it has ended already."""
    asyncio.run(asking.cancel(request_id, as_json=as_json))


@app.command()
def doctor(
    role: Annotated[
        Literal["api", "inference", "cli"], typer.Option(help="Whose NATS user is set here: a service's or a person's.")
    ] = "cli",
    as_json: AsJson = False,
) -> None:
    """Check NATS, topology, clocks, services, disk and model; name a cure for each finding.

    Exit code 0: no problem (warnings are none); 1: at least one; 2: the settings themselves cannot hold.
    """
    raise typer.Exit(asyncio.run(checking.doctor(role=role, as_json=as_json)))


@app.command()
def pause(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Its name, an alias, or its consumer.")],
    for_: Annotated[
        str | None,
        typer.Option("--for", help="So long, as 90s, 10m or 2h; at most 365d.", show_default="until it is resumed"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Hand out no request of a model; new ones wait, and what runs goes on."""
    asyncio.run(steer.pause(model, None if for_ is None else steer.duration_s(for_), as_json=as_json))


@app.command()
def resume(model: Annotated[str, typer.Argument(metavar="MODEL")], as_json: AsJson = False) -> None:
    """Hand out requests of a paused model again."""
    asyncio.run(steer.resume(model, as_json=as_json))


@app.command()
def drain(worker: Annotated[str, typer.Argument(metavar="WORKER_ID")], as_json: AsJson = False) -> None:
    """Have one worker finish what it runs and end, as by SIGTERM."""
    asyncio.run(steer.drain(worker, as_json=as_json))


@app.command()
def chat(
    message: Annotated[str | None, typer.Argument(help="What to say; without it, a conversation.")] = None,
    base_url: Annotated[str | None, typer.Option(help="The api.", show_default="of API_HOST and API_PORT")] = None,
    api_key: Annotated[str | None, typer.Option(help="Key.", show_default="the first of API_KEYS")] = None,
    model: Annotated[str | None, typer.Option(help="Model.", show_default="the first that is served")] = None,
    as_json: AsJson = False,
) -> None:
    """Talk to the model over the api."""
    settings = load(ApiSettings)
    key = api_key or next((known.get_secret_value() for known in settings.api_keys), None)
    url = base_url or bringing_up.url_of(settings.api_host, settings.api_port) + "/v1"
    chatting.chat(chatting.Api(url, key), model, message, as_json=as_json)


@app.command()
def key(
    name: Annotated[str, typer.Argument(help="Whose it is: the name in logs and metrics.")],
    max_requests: Annotated[
        int | None, typer.Option(help="Most of its requests in the queue.", min=1, show_default="KEY_MAX_REQUESTS")
    ] = None,
    operator: Annotated[bool, typer.Option(help="May see and call off everybody's requests.")] = False,
) -> None:
    """Make a key for a client: the entry for API_KEYS_FILE on stdout, the key itself, this once, on stderr."""
    made = keys.make()
    entry = keys.written(name, made, max_requests=max_requests, operator=operator)
    console.say(f"the key of {name}, shown this once: {made}")
    print(entry, end="")


@app.command()
def plan(
    gpu_memory: Annotated[str, typer.Option(help="Memory of the GPU, as 24GiB.")],
    model: Annotated[
        str | None,
        typer.Option(help="Model on this machine, a folder, or a size like 8B.", show_default="DEFAULT_MODEL"),
    ] = None,
    layers: Annotated[int | None, typer.Option(help="With a size: its layers.", min=1)] = None,
    kv_heads: Annotated[int | None, typer.Option(help="With a size: heads of keys and values.", min=1)] = None,
    head_dim: Annotated[int | None, typer.Option(help="With a size: numbers in a head.", min=1)] = None,
    context: Annotated[
        int | None,
        typer.Option(help="Tokens of the longest request, its answer included.", min=512, show_default="8192"),
    ] = None,
    quantization: Annotated[
        Literal["none", "int8", "nf4", "fp4"] | None,
        typer.Option(help="Only this one.", show_default="the most precise that serves --concurrency"),
    ] = None,
    concurrency: Annotated[int, typer.Option(help="Requests that should run at once.", min=1)] = 4,
    request_seconds: Annotated[float, typer.Option(help="Seconds that one request runs.", min=0.1)] = 6.0,
    as_json: AsJson = False,
) -> None:
    """Say which settings fit a model into a GPU's memory."""
    options = planning.Options(
        gpu_memory, model, layers, kv_heads, head_dim, context, quantization, concurrency, request_seconds
    )
    planning.show(planning.make(options, load(Settings)), as_json=as_json)


@topology.command("apply")
def apply(
    model: Annotated[
        str | None, typer.Option(help="Whose consumer: the name that clients use.", show_default="DEFAULT_MODEL's")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would change, and change nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make streams, buckets and the consumer of one model what the settings say; nothing is lost.

    All settings of the environment are applied, so run it with the deployment's whole environment, once for each
    model. What is not changed there too, the next start of a service puts back.
    """
    asyncio.run(shaping.apply(model, dry_run=dry_run, as_json=as_json))


@topology.command("show")
def show(as_json: AsJson = False) -> None:
    """Show streams, consumers and buckets with their live limits."""
    asyncio.run(shaping.show(as_json=as_json))


def _become(module: str) -> None:
    # The service takes this process over: its signals, its output and its exit code are the container's.
    os.execv(sys.executable, [sys.executable, "-m", module])
