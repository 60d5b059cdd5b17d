"""`forebay doctor`: what is wrong with this deployment as seen from this machine, and how to fix it."""

import asyncio
from dataclasses import asdict
from typing import Annotated

import typer

from forebay_cli import console
from forebay_cli.declarations import AsJson, DataDir, NatsUrl, synchronous
from forebay_cli.doctor import machine, nats
from forebay_cli.nats_connection import target
from forebay_contracts.nats.connection import Role


@synchronous
async def doctor(
    role: Annotated[Role, typer.Option(help="Whose NATS user is set here: a service's or a person's.")] = "cli",
    data_dir: DataDir = None,
    nats_url: NatsUrl = None,
    as_json: AsJson = False,
) -> None:
    """Check NATS, topology, clocks, services, disk and model; print a fix for each finding.

    Exit code 0: no problem, perhaps warnings; 1: at least one problem; 2: conflicting or wrong settings.
    """
    at = target(data_dir, nats_url)
    findings = [*await nats.findings(at, role), *await asyncio.to_thread(machine.findings, at.settings)]
    if as_json:
        console.print_json([asdict(finding) for finding in findings])
    else:
        rows = [(found.check, found.severity, found.message, found.fix) for found in findings]
        console.print_tables(console.table("Findings", ("check", "", "found", "fix"), rows))
    raise typer.Exit(int(any(finding.severity == "problem" for finding in findings)))
