"""Make keys, certificates and `site.conf` for a trial of a NATS server with `forebay.conf`.

    python deploy/nats/init.py FOLDER [--host NAME ...] [--store-dir DIR] [--max-store SIZE]

Writes into FOLDER a copy of forebay.conf, site.conf, an NKey seed for each role (ROLE.seed), a certificate
authority (ca.pem) and a server certificate for the hosts. Existing files are kept. To make a new key for one role,
remove its ROLE.seed and run the script again. Needs the packages of `forebay` and the command `openssl`.
"""

import argparse
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import nkeys

ROLES = ("admin", "api", "inference", "operator")
CERTIFICATE_DAYS = 365

SITE = """\
# The settings of this site. forebay.conf includes this file. It has public keys and no secrets.

listen: "{listen}"
http: "127.0.0.1:8222"      # monitoring has no access control
STORE: "{store_dir}"
MAX_STORE: {max_store}

{keys}

tls: {{
    cert_file: "{folder}/server.pem"
    key_file: "{folder}/server.key"
    # For client certificates besides the keys (NATS_TLS_CERT, NATS_TLS_KEY):
    # ca_file: "{folder}/ca.pem"
    # verify: true
    timeout: 5
}}
"""


def main() -> None:
    """Make the files that are missing."""
    parser = argparse.ArgumentParser(description="Keys, certificates and site.conf for a NATS server of Forebay.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--host", action="append", help="name or address of the server; localhost and 127.0.0.1 too")
    parser.add_argument("--listen", default="127.0.0.1:4222")
    parser.add_argument("--store-dir", type=Path, help="where JetStream keeps its files; FOLDER/store")
    parser.add_argument("--max-store", default="10GB", help="most that it may keep")
    options = parser.parse_args()
    folder = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    shutil.copy(Path(__file__).with_name("forebay.conf"), folder / "forebay.conf")
    public = {role: public_key(folder / f"{role}.seed") for role in ROLES}
    if not (folder / "server.pem").exists():
        certificates(folder, ["localhost", "127.0.0.1", *(options.host or ())])
    (folder / "site.conf").write_text(
        SITE.format(
            folder=folder,
            listen=options.listen,
            store_dir=options.store_dir or folder / "store",
            max_store=options.max_store,
            keys="\n".join(f"{role.upper()}_KEY: {key}" for role, key in public.items()),
        )
    )
    print(f"nats-server -c {folder}/forebay.conf")
    print(f"NATS_URL=tls://localhost:4222 NATS_TLS_CA={folder}/ca.pem NATS_NKEY_SEED={folder}/ROLE.seed forebay ...")


def public_key(file: Path) -> str:
    """Return the public key of the seed in `file`. Make the seed if it is missing."""
    if not file.exists():
        write_secret(file, nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER))
    pair = nkeys.from_seed(bytearray(file.read_bytes().strip()))
    key: str = pair.public_key.decode()
    return key


def write_secret(file: Path, secret: bytes) -> None:
    """Write a file that only its owner may read."""
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
        out.write(secret + b"\n")


def certificates(folder: Path, hosts: list[str]) -> None:
    """Make a certificate authority and its certificate for `hosts`, with elliptic curve keys."""
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    days = ["-days", str(CERTIFICATE_DAYS)]
    names = ",".join(("IP:" if host.replace(".", "").isdigit() or ":" in host else "DNS:") + host for host in hosts)
    ca, ca_key = folder / "ca.pem", folder / "ca.key"
    if not ca.exists():
        openssl("req", "-x509", *kind, *days, "-subj", "/CN=Forebay NATS CA", "-keyout", ca_key, "-out", ca)
    with tempfile.TemporaryDirectory() as scratch:
        request, extensions = Path(scratch, "request.pem"), Path(scratch, "extensions")
        extensions.write_text(
            f"subjectAltName={names}\nbasicConstraints=CA:FALSE\nextendedKeyUsage=serverAuth,clientAuth\n"
        )
        openssl("req", *kind, "-subj", f"/CN={hosts[-1]}", "-keyout", folder / "server.key", "-out", request)
        signed = ["-CA", ca, "-CAkey", ca_key, "-CAcreateserial", "-extfile", extensions]
        openssl("x509", "-req", *days, "-in", request, *signed, "-out", folder / "server.pem")


def openssl(*arguments: object) -> None:
    """Run a command. Show its output if it fails."""
    done = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"openssl {arguments[0]} failed:\n{done.stderr}")


if __name__ == "__main__":
    os.umask(0o077)
    main()
