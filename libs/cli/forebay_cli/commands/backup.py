"""`forebay backup` and `forebay restore`: what Forebay stores on NATS, as files."""

from pathlib import Path
from typing import Annotated

import typer
from nats.js.errors import NotFoundError

from forebay_cli import console, snapshots
from forebay_cli.declarations import AsJson, DataDir, NatsUrl, synchronous
from forebay_cli.nats_connection import connected, target
from forebay_contracts.nats import presence
from forebay_contracts.nats.connection import Connection
from forebay_contracts.nats.streams import stream_configs
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import ConfigurationError
from forebay_contracts.wire.heartbeats import ApiInfo, WorkerInfo

_HEARTBEATS = {names.bucket_stream(names.WORKERS_BUCKET), names.bucket_stream(names.APIS_BUCKET)}
"""Not saved: they tell who is alive."""


@synchronous
async def backup(
    folder: Annotated[Path, typer.Argument(help="A new folder for the backup.", metavar="DIR", show_default=False)],
    data_dir: DataDir = None,
    nats_url: NatsUrl = None,
    as_json: AsJson = False,
) -> None:
    """Save what is stored on NATS into a folder.

    The services may run. Each stream is as it was at one moment of its own.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ConfigurationError(f"{folder} is not empty: name a new folder")
    at = target(data_dir, nats_url)
    async with connected(at) as link:
        # It holds what clients have asked and were answered.
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = [
            await snapshots.save(link.client, config.name, folder)
            for config in stream_configs(at.settings)
            if config.name not in _HEARTBEATS and config.name is not None
        ]
    saved = [one for one in found if one is not None]
    snapshots.finish(folder, saved)
    _print(f"saved in {folder}", saved, as_json)


@synchronous
async def restore(
    folder: Annotated[Path, typer.Argument(help="The folder of a backup.", metavar="DIR", show_default=False)],
    replace: Annotated[bool, typer.Option("--replace", help="Delete the streams that are there first.")] = False,
    data_dir: DataDir = None,
    nats_url: NatsUrl = None,
    as_json: AsJson = False,
) -> None:
    """Make the streams and buckets of a backup again.

    No service may run. Run `forebay topology apply` afterwards.
    """
    at = target(data_dir, nats_url).named()
    saved = snapshots.saved_in(folder)
    async with connected(at) as link:
        await _require_no_service(link)
        there = [one.name for one in saved if await _exists(link, one.name)]
        if there and not replace:
            raise ConfigurationError(
                f"{', '.join(there)}: already on this NATS. --replace deletes what is there, and restores the backup"
            )
        for name in there:
            await link.jetstream.delete_stream(name)
        for one in saved:
            await snapshots.restore(link.client, one, folder, at.settings.nats_replicas)
    _print(f"restored from {folder}", saved, as_json)


async def _require_no_service(link: Connection) -> None:
    if not await _exists(link, names.bucket_stream(names.WORKERS_BUCKET)):
        return
    workers = await presence.read(link, names.WORKERS_BUCKET, WorkerInfo)
    apis = await presence.read(link, names.APIS_BUCKET, ApiInfo)
    if workers or apis:
        raise ConfigurationError(
            f"services run on this NATS (apis: {len(apis)}, workers: {len(workers)}): stop them first"
        )


async def _exists(link: Connection, stream: str) -> bool:
    try:
        await link.jetstream.stream_info(stream)
    except NotFoundError:
        return False
    return True


def _print(title: str, streams: list[snapshots.Saved], as_json: bool) -> None:
    rows = [one._asdict() for one in streams]
    if as_json:
        console.print_json({"streams": rows})
    else:
        columns = ("stream", "messages", "bytes")
        console.print_tables(console.table(title, columns, [list(row.values()) for row in rows]))
