"""The `forebay` command: its list of commands, the version and the exit codes of errors."""

import importlib
import logging
import sys
from typing import Annotated, Any, Final

import typer
from typer.core import TyperGroup
from typer.main import get_command

from forebay_contracts.program import run

COMMANDS: Final = {
    "up": ("up", "Start nats-server (unless NATS_URL is set), the api and workers on this machine."),
    "api": ("services", "Run the api in the foreground, for containers."),
    "inference": ("services", "Run one worker in the foreground, for containers."),
    "fetch": ("services", "Fetch and convert the model into DATA_DIR, then exit."),
    "status": ("status", "Show the queue's numbers, the models and the workers."),
    "requests": ("requests", "Show the newest requests and their states."),
    "usage": ("usage", "Show what each key used of each model, a day."),
    "cancel": ("cancel", "Cancel a request that waits or runs."),
    "retry": ("retry", "Run failed requests again: one, or all of a model or of a time."),
    "doctor": ("doctor", "Check NATS, topology, clocks, services, disk and model; print a fix for each finding."),
    "pause": ("pause", "Stop handing out requests of a model. New ones wait, running ones go on."),
    "resume": ("pause", "Hand out requests of a paused model again."),
    "drain": ("drain", "Let one worker finish its running requests and exit, as SIGTERM does."),
    "chat": ("chat", "Chat with a model over the api."),
    "run": ("run", "Chat with a model on this machine; starts it for that if nobody has."),
    "key": ("key", "Make an API key."),
    "plan": ("plan", "Recommend settings that fit a model into a GPU's memory."),
    "backup": ("backup", "Save what is stored on NATS into a folder."),
    "restore": ("backup", "Make the streams and buckets of a backup again."),
    "topology": ("topology", "Show or apply the streams, consumers and buckets on NATS."),
}
"""Each command: its module in `forebay_cli.commands`, and its line in `forebay --help`."""


class LazyGroup(TyperGroup):
    """Imports the module of the command that runs, and no other: `--help` and `--version` need none of them."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """The command that `args` name, from its module."""
        name, _, rest = super().resolve_command(ctx, args)
        return name, None if name is None else load(name), rest


app = typer.Typer(
    cls=LazyGroup,
    help="OpenAI-compatible inference behind a durable NATS JetStream queue.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for listed, (_, summary) in COMMANDS.items():
    app.command(listed, help=summary)(lambda: None)


def load(name: str) -> Any:
    """Import the command `name`."""
    module, _ = COMMANDS[name]
    command = getattr(importlib.import_module(f"forebay_cli.commands.{module}"), name)
    if isinstance(command, typer.Typer):
        return get_command(command)
    alone = typer.Typer(add_completion=False)
    alone.command(name)(command)
    return get_command(alone)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from forebay_contracts.version import VERSION

        typer.echo(VERSION)
        raise typer.Exit


def main() -> None:
    """Run `forebay`. Exit code 2: wrong configuration or usage; 1: any other failure."""
    # At each end of a TLS connection asyncio warns about nats-py's transport. A user cannot change that.
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    sys.exit(run(app, _fail))


def _fail(text: str) -> None:
    from forebay_cli import console

    console.fail(text)
