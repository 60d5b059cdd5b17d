"""The embedded NATS server: one for each DATA_DIR, on the loopback interface. Its store outlives restarts.

Other users of the machine can connect to its port. So it has one user, with an NKey whose seed only the owner of
DATA_DIR can read, and no further port.
"""

import json
import secrets
from pathlib import Path
from typing import Any, Final

import nkeys

from forebay_cli.local.addresses import free_port, why_not_listen
from forebay_cli.local.running import write
from forebay_contracts import extras

HOST: Final = "127.0.0.1"
USUAL_PORT: Final = 4222
READY_LINE: Final = b"Server is ready"

_SEED: Final = "user.seed"

MIN_PAYLOAD_BYTES: Final = 8 * 1024 * 1024
"""A terminal frame may repeat a whole answer with its log probabilities, which is larger than any body."""

HEADER_ROOM_BYTES: Final = 64 * 1024

_CONFIG = """\
# Written by `forebay up` at every start: changes made here are lost.
server_name: forebay
listen: "{host}:{port}"
authorization {{
    users: [{{ nkey: {user} }}]
}}
max_payload: {max_payload}
jetstream {{
    store_dir: "{store}"
}}
"""


def prepare(data_dir: Path, max_request_bytes: int) -> tuple[list[str], dict[str, Any]]:
    """Find the binary and a port, and write the configuration and a context of the `nats` command to DATA_DIR/nats.

    Returns the command, and the settings with which a client connects.

    Raises:
        ConfigurationError: there is no nats-server here.
    """
    extras.require(extras.NATS_SERVER)
    folder = data_dir / "nats"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)  # It holds prompts, and earlier versions made it as the umask says.
    port = USUAL_PORT if why_not_listen(HOST, USUAL_PORT) is None else free_port(HOST)
    url = f"nats://{HOST}:{port}"
    config = _CONFIG.format(
        host=HOST,
        port=port,
        user=_user(folder / _SEED),
        max_payload=max(MIN_PAYLOAD_BYTES, max_request_bytes + HEADER_ROOM_BYTES),
        store=str(folder).replace("\\", "\\\\").replace('"', '\\"'),
    )
    context = {"description": f"Forebay in {data_dir}", "url": url, "nkey": str(folder / _SEED)}
    write(folder / "server.conf", config)
    write(folder / "context.json", json.dumps(context | {"inbox_prefix": "_INBOX.cli"}) + "\n")
    write(folder / "url", url + "\n")
    return [extras.nats_server() or extras.NATS_SERVER, "--config", str(folder / "server.conf")], _access(folder, url)


def _access(folder: Path, url: str) -> dict[str, Any]:
    return {"nats_url": url, "nats_nkey_seed": folder / _SEED, "nats_credentials": None}


def _user(seed: Path) -> str:
    """The public key of the seed in the file `seed`, which is made if it is not there or holds no seed of a user."""
    try:
        seed.chmod(0o600)
        text = seed.read_bytes().strip()
        if text.startswith(b"SU"):
            return str(nkeys.from_seed(bytearray(text)).public_key, "ascii")
    except (FileNotFoundError, nkeys.NkeysError, ValueError):
        pass
    made: bytes = nkeys.encode_seed(secrets.token_bytes(32), nkeys.PREFIX_BYTE_USER)
    write(seed, made.decode())
    return str(nkeys.from_seed(bytearray(made)).public_key, "ascii")
