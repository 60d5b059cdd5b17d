"""Containers by the commands that an operator types, and what can be awaited of them."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

NATS_IMAGE = "nats:2.15.1-alpine"
COMPOSE_FILE = Path(__file__).parents[2] / "deploy/compose.yaml"
UNPRIVILEGED = ("--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")


def run(*command: str, **environment: str) -> str:
    """A command's output; AssertionError with all that it said where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, f"{' '.join(command)}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout.strip()


def docker(*arguments: str) -> str:
    """`docker ARGUMENTS`; its output."""
    return run("docker", *arguments)


def inspect(name: str) -> dict[str, Any]:
    """All that the engine knows of a container or an image."""
    found: dict[str, Any] = json.loads(docker("inspect", name))[0]
    return found


def followed(*command: str, pattern: str) -> re.Match[str] | None:
    """The first match in a line of what a command that goes on says; None where it ends without one."""
    compiled = re.compile(pattern)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    try:
        return next((match for line in process.stdout if (match := compiled.search(line))), None)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def logged(container: str, pattern: str) -> re.Match[str]:
    """Wait for a line of a container's log, one that is there already included."""
    match = followed("docker", "logs", "--follow", container, pattern=pattern)
    assert match is not None, f"{container} ended without {pattern!r}:\n" + log(container)
    return match


def log(container: str) -> str:
    """What a container has said until now."""
    done = subprocess.run(["docker", "logs", container], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.stdout


def becomes_healthy(container: str) -> None:
    """Wait until the health check of a container that runs has passed."""
    events = ["docker", "events", "--filter", f"container={container}", "--format", "{{.Status}}"]
    process = subprocess.Popen(events, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        if inspect(container)["State"]["Health"]["Status"] == "healthy":
            return
        for line in process.stdout:
            if line.strip() in ("health_status: healthy", "die"):
                break
        state = inspect(container)["State"]
        assert state["Health"]["Status"] == "healthy", f"{state}\n{log(container)}"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


class Compose:
    """A project of the compose file: `up` until all is healthy, `down` with its volumes."""

    def __init__(self, project: str, **settings: str) -> None:
        plugin = subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0
        program = ["docker", "compose"] if plugin else [shutil.which("docker-compose") or "docker-compose"]
        self._command = (*program, "--project-name", project, "--file", str(COMPOSE_FILE))
        self._settings = settings
        self._label = f"label=com.docker.compose.project={project}"

    def __call__(self, *arguments: str) -> str:
        """One command of compose; its output."""
        return run(*self._command, *arguments, **self._settings)

    def up(self) -> None:
        """Start everything, and wait until whatever has a health check passes it."""
        self("up", "--detach")
        for container in self.containers():
            if "Healthcheck" in inspect(container)["Config"]:
                becomes_healthy(container)

    def containers(self, *services: str) -> list[str]:
        """The ids of the containers of these services, or of all."""
        return self("ps", "--quiet", *services).split()

    def left(self) -> str:
        """What the engine still has of this project: containers, networks, volumes."""
        listed = (("ps", "--all"), ("network", "ls"), ("volume", "ls"))
        return "".join(docker(*command, "--quiet", "--filter", self._label) for command in listed)
