"""Every metric that Forebay has."""

from dataclasses import dataclass
from typing import Any

import forebay_api.request_metrics
import forebay_inference.worker_metrics
from forebay_api.watching.exposition import QueueGauges
from forebay_contracts.telemetry.metrics import REGISTRY

SERVICES = (forebay_api.request_metrics, forebay_inference.worker_metrics)
"""Imported for what they register."""


@dataclass(frozen=True)
class Defined:
    """A metric as the code defines it."""

    type: str
    documentation: str
    labels: frozenset[str]


def defined() -> dict[str, Defined]:
    """Every metric that either service has, by the name that a scrape shows."""
    owners: dict[str, Any] = REGISTRY._names_to_collectors
    found = [(family, owners[family.name]) for family in REGISTRY.collect() if family.name.startswith("forebay_")]
    found += [(family, family) for family in QueueGauges().collect()]
    return {
        family.name + ("_total" if family.type == "counter" else ""): Defined(
            family.type, family.documentation, frozenset(owner._labelnames)
        )
        for family, owner in found
    }
