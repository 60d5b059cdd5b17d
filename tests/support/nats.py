"""A real nats-server on a free port of the loopback interface, with a store of its own."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import deque
from pathlib import Path

from nats.aio.client import Client

from support.ports import port_of

START_TIMEOUT_S = 60
STOP_TIMEOUT_S = 10


async def flushed(client: Client) -> None:
    """Wait until the server has what was sent before.

    `Client.flush` writes its PING at once, before the commands that still wait to be written. The second PING comes
    after them.
    """
    await client.flush()
    await client.flush()


def nats_server_binary() -> str:
    """The nats-server beside this interpreter, or the one on the PATH."""
    binary = shutil.which("nats-server", path=str(Path(sys.executable).parent)) or shutil.which("nats-server")
    assert binary, "nats-server is missing: install forebay[dev]"
    return binary


class NatsServer:
    """One server: it keeps its port and its store over `stop` and `start`. All calls block until they are done."""

    def __init__(self, store: Path, *options: str) -> None:
        self._store = store
        self._options = options
        self._port = port_of(self)
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None
        self.log: deque[str] = deque(maxlen=1000)
        """Its last log lines."""

    @property
    def url(self) -> str:
        """What NATS_URL must be."""
        return f"nats://127.0.0.1:{self._port}"

    @property
    def pid(self) -> int:
        """The process, to be paused or killed."""
        assert self._process is not None
        return self._process.pid

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process."""
        os.kill(self.pid, number)

    def start(self) -> None:
        """Start, and return when it says that it is ready."""
        assert self._process is None, "started twice"
        command = [nats_server_binary(), "-a", "127.0.0.1", "-p", str(self._port)]
        if "-c" not in self._options:  # a configuration says where it stores
            command += ["-js", "-sd", str(self._store)]
        process = subprocess.Popen(command + list(self._options), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        self._process = process
        ready = threading.Event()
        self._reader = threading.Thread(target=self._read, args=(process, ready), daemon=True)
        self._reader.start()
        assert ready.wait(START_TIMEOUT_S), "nats-server is not ready"
        assert process.poll() is None, "nats-server did not start:\n" + "\n".join(self.log)

    def stop(self) -> None:
        """End it in order; nothing happens if it does not run."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
        self._ended()

    def kill(self) -> None:
        """End it without a chance to write anything."""
        if self._process is not None:
            self._process.kill()
        self._ended()

    def restart(self) -> None:
        """Stop, and start on the same port with the same store."""
        self.stop()
        self.start()

    def _ended(self) -> None:
        if self._process is None or self._reader is None:
            return
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        self._process = self._reader = None

    def _read(self, process: subprocess.Popen[bytes], ready: threading.Event) -> None:
        assert process.stderr is not None
        with process.stderr:
            for line in process.stderr:
                self.log.append(line.decode(errors="replace").rstrip())
                if b"Server is ready" in line:
                    ready.set()
        ready.set()
