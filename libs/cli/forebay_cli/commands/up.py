"""`forebay up`: nats-server, api and workers on this machine, one process each."""

import asyncio
import contextlib
import signal
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any

import typer

from forebay_cli import console
from forebay_cli.declarations import synchronous
from forebay_cli.local import summary
from forebay_cli.local.deployment import Deployment
from forebay_cli.local.running import exclusive
from forebay_cli.local.supervisor import ChildDied, Supervisor


@synchronous
async def up(
    host: Annotated[str | None, typer.Option(help="Address of the api (API_HOST).", show_default="127.0.0.1")] = None,
    port: Annotated[
        int | None, typer.Option(help="Port of the api (API_PORT).", show_default="8091", min=0, max=65_535)
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Hub id, folder or GGUF file; once for each model (DEFAULT_MODEL).", show_default="SmolLM2-135M"
        ),
    ] = None,
    workers: Annotated[int, typer.Option(help="Worker processes of each model.", min=1, max=64)] = 1,
    engine: Annotated[
        str | None,
        typer.Option(
            help="transformers, llamacpp, vllm, sglang, openai, embedding, simulated (INFERENCE_ENGINE).",
            show_default="transformers",
        ),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Models, the NATS store, logs (DATA_DIR).", show_default="~/.cache/forebay"),
    ] = None,
    nats_url: Annotated[
        str | None, typer.Option(help="A NATS server that runs already (NATS_URL).", show_default="one of its own")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print every log line of every process.")] = False,
) -> None:
    """Start nats-server (unless NATS_URL is set), the api and workers on this machine.

    Prints `ready http://HOST:PORT` once requests are answered. SIGINT and SIGTERM let running requests finish.
    """
    options = {
        "api_host": host,
        "api_port": port,
        "inference_engine": engine,
        "data_dir": data_dir,
        "nats_url": nats_url,
    }
    given = {name: value for name, value in options.items() if value is not None}
    raise typer.Exit(await _run(Deployment(given, model or (), workers, verbose=verbose)))


async def _run(deployment: Deployment) -> int:
    """Start everything, print the ready line, and end everything on SIGINT or SIGTERM; returns the exit code."""
    deployment.check_port()
    with exclusive(deployment.data_dir):
        stopped = _stop_on_signals(deployment.supervisor)
        code = 0
        try:
            if not await _first(stopped.wait(), deployment.supervisor.failure(), deployment.bring_up()):
                _say_ready(deployment)
                await _first(stopped.wait(), deployment.supervisor.failure())
        except ChildDied as exc:
            console.fail(f"{exc}\nforebay: draining the others")
            code = 1
        finally:
            faults = await deployment.drain()
        for fault in faults:
            console.fail(fault)
        return 1 if faults or deployment.supervisor.killed else code


def _say_ready(deployment: Deployment) -> None:
    """Print `ready` and the URL on stdout for programs, and the rest on stderr for people."""
    url, settings = deployment.url, deployment.settings
    console.stdout.print(f"ready {url}", markup=False)
    has_keys = bool(settings.api_keys or settings.api_keys_file)
    for line in summary.lines(url, deployment.nats, deployment.data_dir, deployment.ready, has_keys=has_keys):
        console.say(line)


def _stop_on_signals(supervisor: Supervisor) -> asyncio.Event:
    """An event that the first SIGINT or SIGTERM sets. The second one kills all children."""
    stopped = asyncio.Event()

    def on_signal() -> None:
        if stopped.is_set():
            if not supervisor.killed:
                console.say("stopped at once: what ran was cut off")
            supervisor.kill()
        stopped.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    return stopped


async def _first(*coroutines: Coroutine[Any, Any, Any]) -> Any:
    """The result or the error of the first that ends; the others are cancelled."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return done.pop().result()
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task
