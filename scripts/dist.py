"""Make what a release has besides its images, in dist/: `dist.py [URL]`. Needs build, twine and helm-python-sdk.

The wheel, the sdist and the Helm chart are made of the files of the last commit. URL is the repository's page: the
links of the README lead there, since an index shows the README without the repository. VERSION overrides git's tags.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from io import BytesIO
from pathlib import Path

import helm_python
from readme import absolute

DIST = Path("dist")
CHART = Path("deploy/helm")


def main(url: str | None) -> int:
    """Write the three; the exit status."""
    scm = subprocess.run([sys.executable, "-m", "setuptools_scm"], check=True, capture_output=True, text=True)
    version = os.environ.get("VERSION") or scm.stdout.strip()
    shutil.rmtree(DIST, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder)
        archive = subprocess.run(["git", "archive", "HEAD"], check=True, capture_output=True).stdout
        with tarfile.open(fileobj=BytesIO(archive)) as files:
            files.extractall(source, filter="data")
        if url is not None:
            _name_the_repository(source, url, f"v{version}")
        _run("-m", "build", "--outdir", DIST, source, SETUPTOOLS_SCM_PRETEND_VERSION_FOR_FOREBAY=version)
        _run("-m", "twine", "check", "--strict", *DIST.glob("forebay-*"))
        if (source / CHART).is_dir():
            semantic = version.replace(".dev", "-dev.")
            helm_python.package(source / CHART, destination=DIST, version=semantic, app_version=version)
    for made in sorted(DIST.iterdir()):
        print(f"{made}: {made.stat().st_size:,} bytes")
    return 0


def _name_the_repository(source: Path, url: str, tag: str) -> None:
    readme, project = source / "README.md", source / "pyproject.toml"
    readme.write_text(absolute(readme.read_text(), url, tag))
    with project.open("a") as file:
        file.write(f'\n[project.urls]\nRepository = "{url}"\nChangelog = "{url}/blob/{tag}/CHANGELOG.md"\n')


def _run(*arguments: object, **environment: str) -> None:
    subprocess.run([sys.executable, *map(str, arguments)], check=True, env=os.environ | environment)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2] or [None]))
