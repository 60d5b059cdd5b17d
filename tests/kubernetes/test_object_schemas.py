"""Every object against the schemas of Kubernetes and of the operators in use; a field that they lack is refused."""

import copy
import functools
import json
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest

from support.manifests import Manifests, Object

SCHEMAS = Path(__file__).parent / "schemas"
OPERATORS = {"gateway.networking.k8s.io", "keda.sh", "monitoring.coreos.com"}
KUBERNETES = ("1.31", "1.34", "1.37")
"""The oldest that docs/kubernetes.md names, one between, and the newest that the validator knows."""


def group(found: Object) -> str:
    return str(found["apiVersion"].rpartition("/")[0])


@functools.cache
def operator_schema(kind: str, api_version: str) -> Any:
    """A CRD's schema. An API server drops what it does not know; here that is an error."""
    schema = json.loads((SCHEMAS / f"{kind.lower()}-{api_version.replace('/', '-')}.json").read_text())
    return jsonschema.Draft202012Validator(closed(schema, root=True))


def closed(schema: Any, *, root: bool = False) -> Any:
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: closed(value) for key, value in schema.items()}
    if not root and isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        found.setdefault("additionalProperties", False)
    return found


def test_an_operators_resource_is_one(manifests: Manifests) -> None:
    for found in manifests.objects:
        if group(found) in OPERATORS:
            operator_schema(found["kind"], found["apiVersion"]).validate(found)


@pytest.mark.parametrize("version", KUBERNETES)
def test_kubernetes_knows_every_field(manifests: Manifests, version: str) -> None:
    ours = [found for found in manifests.objects if group(found) not in OPERATORS]
    assert len(ours) > 20
    for found in ours:
        kubernetes_validate.validate(found, version, strict=True)


def test_a_misspelt_field_is_refused(production: Manifests) -> None:
    deployment = copy.deepcopy(production.one("Deployment", "forebay-api"))
    deployment["spec"]["template"]["spec"]["terminationGracePeriodSecond"] = 1
    with pytest.raises(kubernetes_validate.ValidationError, match="terminationGracePeriodSecond"):
        kubernetes_validate.validate(deployment, KUBERNETES[-1], strict=True)

    scaled = copy.deepcopy(production.one("ScaledObject", "forebay-inference"))
    scaled["spec"]["cooldownPeriods"] = 1
    with pytest.raises(jsonschema.ValidationError, match="cooldownPeriods"):
        operator_schema("ScaledObject", scaled["apiVersion"]).validate(scaled)
