"""The chart deploy/helm, rendered by the Helm that HELM_PYTHON names: an interpreter with helm-python-sdk.

`HELM_PYTHON=PYTHON python -m support.helm`, with JSON on stdin, is the program that this module runs there.
"""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

CHART = Path(__file__).parents[2] / "deploy" / "helm"


class ChartError(Exception):
    """What Helm says about values that it refuses."""


def helm_python() -> Path:
    """The interpreter."""
    assert "HELM_PYTHON" in os.environ, "HELM_PYTHON is not set: run `make check-kubernetes`"
    return Path(os.environ["HELM_PYTHON"])


def render(values: dict[str, Any], **options: Any) -> str:
    """The objects as YAML. `options` are those of `Chart.render`: `is_upgrade`, `revision`.

    Raises:
        ChartError: the values do not fit the schema, or a template refuses them.
    """
    asked = {"values": values, "options": {"name": "forebay", "namespace": "forebay", "revision": 1} | options}
    done = subprocess.run(
        [helm_python(), __file__, CHART],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if done.returncode != 0:
        raise ChartError(done.stderr)
    return done.stdout


def planned(command: str) -> dict[str, Any]:
    """The values that `forebay COMMAND --helm-values` writes."""
    import yaml

    done = subprocess.run(
        [sys.executable, "-m", "forebay_cli", *shlex.split(command), "--helm-values"],
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, Any] = yaml.safe_load(done.stdout)
    return found


def _main() -> None:
    from helm_python import Chart, lint

    asked = json.load(sys.stdin)
    chart = Chart.load(sys.argv[1])
    chart.validate_schema(asked["values"])
    report = lint(sys.argv[1], asked["values"], strict=True)
    assert not report["errors"], report
    for name, text in chart.render(asked["values"], **asked["options"]).items():
        if name.endswith(".yaml"):
            print("---", text, sep="\n")


if __name__ == "__main__":
    _main()
