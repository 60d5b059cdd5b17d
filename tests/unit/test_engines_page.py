"""The tables of docs/engines.md, compared with the code."""

import re
from pathlib import Path
from typing import get_args

from forebay_contracts.settings import InferenceSettings
from forebay_inference.engine.protocol import Capabilities
from forebay_inference.engine.served.dialects import DIALECTS
from forebay_inference.engine.transformers.engine import TransformersEngine

PAGE = (Path(__file__).parents[2] / "docs" / "engines.md").read_text()
CAPABILITIES = {name: made().capabilities for name, made in DIALECTS.items()} | {
    "transformers": TransformersEngine.capabilities
}


def rows(heading: str) -> dict[str, list[str]]:
    section = PAGE.split(f"# {heading}\n")[1].split("\n#")[0]
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:3] == "| `"
    ]
    return {row[0].strip("`"): row[1:] for row in cells}


def described(can: Capabilities) -> list[str]:
    goes_on = {
        "exact": "exactly",
        "greedy": "exactly at temperature 0, with other draws above it",
        "no": "no",
    }[can.resumes]
    # Whoever gives a seed wants its draws: see `TextModel`.
    anew = [*([] if can.resumes_grammars else ["a grammar or a seed"]), *(f"`{name}`" for name in can.restarts)]
    return [
        goes_on + (f"; not with {', '.join(anew)}" if anew else ""),
        "yes" if can.grammars == "enforced" else "no",
        "yes" if can.logprobs else "no",
        "yes" if can.prompt_logprobs else "no",
        "yes" if can.adapters else "no",
        ", ".join(f"`{name}`" for name in can.refused),
    ]


def test_every_engine_has_its_row() -> None:
    engines = get_args(InferenceSettings.model_fields["inference_engine"].annotation)
    assert set(rows("Choosing an engine")) == set(engines)


def test_what_each_can_do_is_what_it_declares() -> None:
    assert rows("What each can do") == {name: described(can) for name, can in CAPABILITIES.items()}


def test_the_settings_that_it_names_are_settings() -> None:
    named = set(re.findall(r"\b(?:ENGINE|WORKER|LLM)_[A-Z_]+\b", PAGE))
    assert named <= {name.upper() for name in InferenceSettings.model_fields}
