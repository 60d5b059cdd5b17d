"""`forebay usage`: what keys used of models a day, read from NATS without any service."""

from typing import Annotated

import typer

from forebay_cli import console
from forebay_cli.declarations import AsJson, DataDir, NatsUrl, synchronous
from forebay_cli.nats_connection import connected, target
from forebay_contracts.queueing.state_store import KeyValueStateStore
from forebay_contracts.queueing.usage import UsageRow, grouped, last_days, total
from forebay_contracts.wire.errors import ConfigurationError

GROUPS = ("day", "model", "key")

COUNTS = ("requests", "prompt", "cached", "compl.", "queue s")

TITLE = "Usage: requests, tokens of prompts, of these from a cache, of completions, and seconds in the queue"


@synchronous
async def usage(
    days: Annotated[int, typer.Option(help="Today (UTC), and the days before it.", min=1, max=3_660)] = 7,
    by: Annotated[
        list[str] | None,
        typer.Option(help="Sum over all else than day, model or key; repeat for more.", show_default="day, model, key"),
    ] = None,
    key: Annotated[str | None, typer.Option(help="Only of this key.")] = None,
    model: Annotated[str | None, typer.Option(help="Only of this model: its name, or the end of it.")] = None,
    data_dir: DataDir = None,
    nats_url: NatsUrl = None,
    as_json: AsJson = False,
) -> None:
    """Show what each key used of each model, a day.

    Requests that have ended, tokens in and out, and seconds in the queue. Days are those of UTC.
    """
    groups = tuple(dict.fromkeys(by or GROUPS))
    if not set(groups) <= set(GROUPS):
        raise ConfigurationError(f"--by takes {', '.join(GROUPS)}")
    async with connected(target(data_dir, nats_url)) as link:
        rows = await KeyValueStateStore(link).usage(last_days(days), None if key is None else [key])
    rows = [row for row in rows if model is None or f"/{row.model}".endswith(f"/{model}")]
    rows = grouped(rows, groups)
    if as_json:
        console.print_json([row.model_dump(exclude_unset=True) for row in rows])
    else:
        rows.append(total(rows, **{groups[0]: "total"}))
        console.print_tables(console.table(TITLE, (*groups, *COUNTS), [_cells(row, groups) for row in rows]))


def _cells(row: UsageRow, groups: tuple[str, ...]) -> tuple[object, ...]:
    counts = row.requests, row.prompt_tokens, row.cached_tokens, row.completion_tokens
    return *(getattr(row, group) for group in groups), *counts, f"{row.queue_seconds:.1f}"
