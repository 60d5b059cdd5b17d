"""`forebay key`: a new API key."""

from typing import Annotated

import typer

from forebay_cli import console
from forebay_contracts import keys


def key(
    name: Annotated[str, typer.Argument(help="The client's name in logs and metrics.")],
    max_requests: Annotated[
        int | None, typer.Option(help="Most of its requests in the queue.", min=1, show_default="KEY_MAX_REQUESTS")
    ] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(help="Most of its tokens in a minute.", min=1)] = None,
    tokens_per_day: Annotated[int | None, typer.Option(help="Most of its tokens in a day (UTC).", min=1)] = None,
    weight: Annotated[
        float | None, typer.Option(help="Its share of the tokens in the waiting room.", show_default="1")
    ] = None,
    tier: Annotated[
        list[str] | None,
        typer.Option(
            help="Service tier that it may use, default or flex; repeat for both. Requests without one get the first.",
            show_default="default, flex",
        ),
    ] = None,
    operator: Annotated[bool, typer.Option(help="May see and cancel everybody's requests.")] = False,
) -> None:
    """Make an API key. The entry for API_KEYS_FILE goes to stdout; the key goes to stderr, this once."""
    made = keys.make()
    entry = keys.written(
        name,
        made,
        max_requests=max_requests,
        tokens_per_minute=tokens_per_minute,
        tokens_per_day=tokens_per_day,
        weight=weight,
        tiers=tier or None,
        operator=operator,
    )
    console.say(f"the key of {name}, shown this once: {made}")
    print(entry, end="")
