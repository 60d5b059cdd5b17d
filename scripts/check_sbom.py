"""Check that a bill of materials is CycloneDX and names Forebay's direct dependencies: `check_sbom.py FILE`."""

import json
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def main(file: Path) -> int:
    """Name each dependency that is missing; exit code 1 if there is one."""
    document = json.loads(file.read_text())
    root = document["metadata"]["component"]
    if (document["bomFormat"], root["name"]) != ("CycloneDX", "forebay"):
        print(f"{file} is no CycloneDX document of forebay", file=sys.stderr)
        return 1
    names = {part["bom-ref"]: canonicalize_name(part["name"]) for part in document["components"]}
    direct = {
        names[ref] for edge in document["dependencies"] if edge["ref"] == root["bom-ref"] for ref in edge["dependsOn"]
    }
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = (Requirement(line) for line in [*project["dependencies"], *extras["api"], *extras["inference"]])
    missing = sorted(one.name for one in wanted if canonicalize_name(one.name) not in direct)
    for name in missing:
        print(f"{file}: {name} is not in it", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
