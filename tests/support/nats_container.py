"""A nats-server in a container, which does what `NatsServer` does."""

import os
import subprocess
from datetime import UTC, datetime
from typing import Any

from testcontainers.core.config import testcontainers_config
from testcontainers.core.container import DockerContainer

from support.containers import NATS_IMAGE, followed, log
from support.ports import port_of

CHECK_TIMEOUT_S = 2
STOP_TIMEOUT_S = 10

# The container that would remove ours after a test run that was killed: privileged, and one more image to have.
testcontainers_config.ryuk_disabled = True


def why_no_container() -> str | None:
    """What keeps NATS from running in a container here; None where nothing does. It fetches nothing."""
    if not os.environ.get("DOCKER_HOST", "unix://").startswith("unix://"):
        return "the container engine may be another machine's, whose loopback interface is not ours"
    try:
        found = subprocess.run(
            ["docker", "image", "inspect", NATS_IMAGE], capture_output=True, text=True, timeout=CHECK_TIMEOUT_S
        )
    except FileNotFoundError:
        return "there is no docker command"
    except subprocess.TimeoutExpired:
        return f"the container engine does not answer in {CHECK_TIMEOUT_S} s"
    if found.returncode == 0:
        return None
    absent = "no such image" in found.stderr.lower()
    return f"the container engine has no {NATS_IMAGE}" if absent else "no container engine answers"


class NatsContainer:
    """One server: it keeps its port and its store over `stop` and `start`. All calls block until they are done."""

    def __init__(self) -> None:
        self._port = port_of(self)  # the engine would choose another at every start
        self._container = DockerContainer(NATS_IMAGE)
        self._container.with_command(["nats-server", "--jetstream", "--store_dir", "/data"])
        self._container.ports["4222/tcp"] = ("127.0.0.1", self._port)
        self._started = False

    @property
    def url(self) -> str:
        """What NATS_URL must be."""
        return f"nats://127.0.0.1:{self._port}"

    @property
    def pid(self) -> int:
        """The process, on the engine's machine."""
        pid: int = self._state()["Pid"]
        return pid

    def start(self) -> None:
        """Start, and return when it says that it is ready."""
        since = datetime.now(UTC).isoformat()  # of the engine's own StartedAt, the first lines may be older
        if self._started:
            self._container.get_wrapped_container().start()
        else:
            self._container.start()
            self._started = True
        name = self._container.get_container_id()
        ready = followed("docker", "logs", "--follow", "--since", since, name, pattern="Server is ready")
        assert ready, "nats-server did not start:\n" + log(name)

    def stop(self) -> None:
        """End it in order; nothing happens if it does not run."""
        self._container.get_wrapped_container().stop(timeout=STOP_TIMEOUT_S)

    def kill(self) -> None:
        """End it without a chance to write anything."""
        container = self._container.get_wrapped_container()
        container.kill()
        container.wait()

    def restart(self) -> None:
        """Stop, and start on the same port with the same store."""
        self.stop()
        self.start()

    def remove(self) -> None:
        """End it, and leave nothing of it."""
        self._container.stop()

    def _state(self) -> dict[str, Any]:
        self._container.reload()
        state: dict[str, Any] = self._container.get_wrapped_container().attrs["State"]
        return state
