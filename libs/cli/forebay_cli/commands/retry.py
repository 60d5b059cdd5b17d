"""`forebay retry`: failed requests run again, over the HTTP api, which then looks after them."""

import time
from typing import Annotated, Any
from urllib.parse import quote

import httpx
import typer

from forebay_cli import console
from forebay_cli.api_client import ApiFailure, ApiKey, BaseUrl, api_client, api_target
from forebay_cli.declarations import AsJson, DataDir, duration_s
from forebay_contracts.wire.errors import ConfigurationError

TIMEOUT_S = 30.0

PAGE = 100


def retry(
    request_id: Annotated[str | None, typer.Argument(metavar="ID", help="The failed request, or its response.")] = None,
    model: Annotated[str | None, typer.Option(help="All of this model: its name, or the end of it.")] = None,
    since_s: Annotated[
        float | None,
        typer.Option(
            "--since", help="All that failed within the last 90s, 10m, 2h.", parser=duration_s, metavar="DURATION"
        ),
    ] = None,
    base_url: BaseUrl = None,
    api_key: ApiKey = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Run failed requests again: one, or all of a model or of a time. Exit code 1: one could not be."""
    if (request_id is None) == (model is None and since_s is None):
        raise ConfigurationError("give the ID of a failed request, or --model, --since or both")
    with api_client(api_target(base_url, api_key, data_dir).named(), TIMEOUT_S) as client:
        chosen = [request_id] if request_id is not None else _failed(client, model, since_s)
        done, problems = [], []
        for one in chosen:
            try:
                done.append(client.post(f"queue/request/{quote(one, safe='')}/retry").json())
            except ApiFailure as exc:
                problems.append(f"{one}: {exc}")
    if as_json:
        console.print_json(done)
    else:
        for one in done:
            console.stdout.print(f"{one['id']} runs again as {one['retried_as']}", markup=False)
        if not chosen:
            console.say("no such request has failed and is kept")
    if problems:
        raise ApiFailure("; ".join(problems))


def _failed(client: httpx.Client, model: str | None, since_s: float | None) -> list[str]:
    """The ids of the failed requests that are meant, oldest first. All are read before one runs again and may fail."""
    found: list[dict[str, Any]] = []
    query: dict[str, Any] = {"limit": PAGE}
    while True:
        page = client.get("queue/failed", params=query).json()
        found += page["data"]
        if not page["has_more"]:
            break
        query["after"] = page["last_id"]
    first = time.time() - since_s if since_s is not None else 0
    return [
        one["id"]
        for one in found
        if (model is None or one["model"] == model or one["model"].endswith("/" + model))
        and one["finished_at"] >= first
    ]
