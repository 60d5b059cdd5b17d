"""Generated JSON schemas."""

import random
from typing import Any


def schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    """A schema that can be met, of whatever `rng` likes."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const", "pattern"]
    if depth < 3:
        kinds += ["object", "array", "anyOf", "object", "array"]
    match rng.choice(kinds):
        case "string":
            return {"type": "string", "maxLength": rng.randint(0, 12)}
        case "integer":
            low = rng.randint(-100, 100)
            return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 500)}
        case "number":
            return {"type": "number", "minimum": 0, "maximum": rng.randint(1, 50)}
        case "enum":
            return {"enum": rng.sample(["a", "é", "", 1, 2.5, True, None, '"', "\\"], rng.randint(1, 4))}
        case "const":
            return {"const": rng.choice(["x", 3, {"a": [1]}, []])}
        case "pattern":
            return {"type": "string", "pattern": rng.choice([r"^[a-f]{2,4}$", r"^\d{4}-\d{2}$", r"^(on|off)$"])}
        case "object":
            names = [f"p{number}" for number in range(rng.randint(0, 4))]
            return {
                "type": "object",
                "properties": {name: schema(rng, depth + 1) for name in names},
                "required": rng.sample(names, rng.randint(0, len(names))),
                "additionalProperties": False,
            }
        case "array":
            least = rng.randint(0, 2)
            items = schema(rng, depth + 1)
            return {"type": "array", "items": items, "minItems": least, "maxItems": least + rng.randint(0, 2)}
        case "anyOf":
            return {"anyOf": [schema(rng, depth + 1) for _ in range(rng.randint(1, 3))]}
        case kind:
            return {"type": kind}
