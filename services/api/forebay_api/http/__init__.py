"""HTTP: bounds, headers, bodies, errors."""
