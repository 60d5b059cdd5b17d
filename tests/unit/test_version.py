"""Which version is built, asked of the real git and setuptools-scm with our own pyproject.toml."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version

from forebay_contracts.version import VERSION

ROOT = Path(__file__).parents[2]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
FALLBACK = SETTINGS["tool"]["setuptools_scm"]["fallback_version"]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A source tree without git."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def run(tree: Path, *command: str, **environment: str) -> str:
    """What a command in the tree says, with nothing of this machine's git or of an outer build."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("GIT_", "SETUPTOOLS_SCM_"))}
    # The tree is a repository of its own or none at all, even where temporary files lie in another.
    alone = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", "GIT_CEILING_DIRECTORIES": str(tree.parent)}
    return subprocess.run(
        command, cwd=tree, env=kept | alone | environment, check=True, capture_output=True, text=True
    ).stdout.strip()


def git(tree: Path, *arguments: str) -> None:
    run(tree, "git", "-c", "user.name=Test", "-c", "user.email=test@example.com", *arguments)


def commit(tree: Path) -> None:
    git(tree, "add", "pyproject.toml")
    git(tree, "commit", "--allow-empty", "--message", "Some change")


def built(tree: Path, **environment: str) -> str:
    return run(tree, sys.executable, "-m", "setuptools_scm", **environment)


def test_a_tag_is_the_version(tree: Path) -> None:
    git(tree, "init")
    commit(tree)
    git(tree, "tag", "--annotate", "v1.2.3", "--message", "1.2.3")
    assert built(tree) == "1.2.3"
    commit(tree)
    assert re.fullmatch(r"1\.2\.4\.dev1\+g[0-9a-f]+", built(tree))


def test_without_a_tag_it_is_the_next_version(tree: Path) -> None:
    git(tree, "init")
    commit(tree)
    commit(tree)
    found = built(tree)
    assert re.fullmatch(re.escape(FALLBACK.removesuffix("0")) + r"2\+g[0-9a-f]+", found)
    assert Version(FALLBACK) < Version(found) < Version(Version(FALLBACK).base_version)


def test_without_git_it_is_the_fallback_or_what_the_builder_says(tree: Path) -> None:
    assert built(tree) == FALLBACK
    assert built(tree, SETUPTOOLS_SCM_PRETEND_VERSION_FOR_FOREBAY="1.2.3") == "1.2.3"


def test_the_fallback_is_newer_than_every_release() -> None:
    released = re.findall(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released
    assert Version(FALLBACK) > max(map(Version, released))


def test_the_image_pins_what_the_build_needs() -> None:
    locked = dict(re.findall(r"^([a-z-]+)==(\S+)", (ROOT / "constraints/build.lock").read_text(), re.MULTILINE))
    required = dict(line.split(">=") for line in SETTINGS["build-system"]["requires"])
    assert {name: Version(locked[name]) >= Version(least) for name, least in required.items()} == dict.fromkeys(
        required, True
    )


def test_the_version_told_is_that_of_the_installed_distribution() -> None:
    assert version("forebay") == VERSION
    assert str(Version(VERSION))
