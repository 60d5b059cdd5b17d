"""All checks that need NATS, over one connection."""

import asyncio
from collections.abc import Awaitable, Callable

from nats.errors import Error as NatsError

from forebay_cli import console
from forebay_cli.doctor import clocks, jetstream, permissions, services, topology
from forebay_cli.doctor.findings import Finding
from forebay_cli.nats_connection import Target, permission_violations
from forebay_contracts.nats import connection
from forebay_contracts.nats.connection import Connection, Role
from forebay_contracts.settings import Settings
from forebay_contracts.wire.errors import ConfigurationError, QueueUnavailable

Check = Callable[[Connection, Settings], Awaitable[list[Finding]]]

_AS_OPERATOR = "run it as `operator` of deploy/nats/forebay.conf"

_PERMIT = "run it as `operator` or `admin` of deploy/nats/forebay.conf, or allow this user there what it names"

_FIXES = {
    "too old": "update nats-server to 2.12 or newer, or set NATS_URL to one that is",
    "refuses this user": "set NATS_NKEY_SEED or NATS_CREDENTIALS to the file of a user that the server knows",
    "NATS_NKEY_SEED": "set NATS_NKEY_SEED to a file with one line that begins with SU",
    "credentials": "set NATS_CREDENTIALS or NATS_NKEY_SEED to a file that exists and can be read",
    "TLS files": "set NATS_TLS_CA, NATS_TLS_CERT and NATS_TLS_KEY to PEM files that can be read",
    "does not speak TLS": "enable TLS on the server, or leave NATS_TLS_CA and NATS_TLS_CERT empty",
    "MODEL_NAME": "set another MODEL_NAME for one of the two models",
}
"""By words in a ConfigurationError of the connection or the topology."""


async def findings(at: Target, role: Role) -> list[Finding]:
    """Connect and run the checks."""
    read = at.settings
    with permission_violations() as violations:
        try:
            async with connection.connected(read, "forebay doctor", role) as link:
                version = link.client.connected_server_version
                number = f"{version.major}.{version.minor}.{version.patch}"
                found = [Finding("nats", "ok", f"nats-server {number} answers at {link.server}")]
                console.say_server(link.server, at.named_by)
                found += await _with_connection(link, read, role, violations)
        except QueueUnavailable as exc:
            fix = "start it (`forebay up` brings its own), or give its address (NATS_URL, --nats-url, --data-dir)"
            return [Finding("nats", "problem", str(exc), fix)]
        except ConfigurationError as exc:
            return [_wrong_setting("nats", exc)]
    return found


async def _with_connection(link: Connection, read: Settings, role: Role, violations: list[str]) -> list[Finding]:
    found = await _run("permissions", permissions.check, link, read)
    if any(f"_inbox.{role}." in line.lower() for line in violations):
        message = f"with --role {role}, this user gets no answers: it may not subscribe to _INBOX.{role}.>"
        fix = "give `--role api` or `inference` for the user of that service, and none for `operator` and `admin`"
        return [Finding("permissions", "problem", message, fix)]
    found += await _checks(link, read)
    if role != "cli":
        # Some checks need more than a service does. What the service lacks, the check of permissions has said.
        return [_not_checked(finding) if violations and finding.fix == _PERMIT else finding for finding in found]
    return found + [Finding("permissions", "problem", line, _PERMIT) for line in violations]


def _not_checked(finding: Finding) -> Finding:
    return Finding(finding.check, "warning", "not checked: the user of a service may not ask for it", _AS_OPERATOR)


async def _checks(link: Connection, read: Settings) -> list[Finding]:
    try:
        found = await _run("jetstream", jetstream.check, link, read)
    except jetstream.JetStreamOff as exc:
        fix = "start nats-server with JetStream (`-js`), and enable it for the account"
        return [Finding("jetstream", "problem", f"JetStream is off: {exc}", fix)]
    checks: dict[str, Check] = {
        "topology": topology.check,
        "limits": topology.check_limits,
        "clocks": clocks.check,
        "models": services.check_models,
        "services": services.check_services,
    }
    # At the same time, since each denied call costs its whole timeout.
    results = await asyncio.gather(*(_run(name, check, link, read) for name, check in checks.items()))
    return found + [finding for some in results for finding in some]


async def _run(name: str, check: Check, link: Connection, read: Settings) -> list[Finding]:
    try:
        return await check(link, read)
    except ConfigurationError as exc:
        return [_wrong_setting(name, exc)]
    except (NatsError, TimeoutError, QueueUnavailable) as exc:
        return [Finding(name, "problem", f"NATS did not answer: {exc or type(exc).__name__}", _PERMIT)]


def _wrong_setting(check: str, error: ConfigurationError) -> Finding:
    fix = next((fix for words, fix in _FIXES.items() if words in str(error)), "correct the setting that it names")
    return Finding(check, "problem", str(error), fix)
