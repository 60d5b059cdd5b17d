"""Every metric that Forebay has."""

from typing import Any

import forebay_api.metrics
import forebay_inference.metrics
from forebay_api.exposition import QueueGauges
from forebay_contracts.metrics import REGISTRY

SERVICES = (forebay_api.metrics, forebay_inference.metrics)
"""Imported for what they register."""


def defined() -> dict[str, Any]:
    """Every metric that either service has, by the name that a scrape shows."""
    families = [family for family in REGISTRY.collect() if family.name.startswith("forebay_")]
    families += list(QueueGauges().describe())
    return {family.name + ("_total" if family.type == "counter" else ""): family for family in families}
