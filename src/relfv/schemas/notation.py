"""How the forms of JSON artifacts are written down in this package; each value is a JSON Schema (draft 2020-12)."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

ANY: Schema = {}
TEXT: Schema = {"type": "string"}
NUMBER: Schema = {"type": "number"}
WHOLE: Schema = {"type": "integer"}
INDEX: Schema = {"type": "integer", "minimum": 0}
"""A layer, head, row, token id or count."""
FLAG: Schema = {"type": "boolean"}
ZERO_OR_ONE: Schema = {"enum": [0, 1]}
SHA256: Schema = {"type": "string", "pattern": "^[0-9a-f]{64}$"}


def record(required: Schema, optional: Schema | None = None) -> Schema:
    """An object with these keys; others may come with later versions."""
    return {"type": "object", "properties": {**required, **(optional or {})}, "required": list(required)}


def array(of: Schema) -> Schema:
    """A list."""
    return {"type": "array", "items": of}


def by_name(of: Schema) -> Schema:
    """An object whose keys are names or numbers: q_ids, layers, controls, paths."""
    return {"type": "object", "additionalProperties": of}


def nullable(of: Schema) -> Schema:
    """Null where there is none, or where it is not known."""
    return {"anyOf": [of, {"type": "null"}]}


def either(*kinds: Schema) -> Schema:
    """One of several."""
    return {"anyOf": list(kinds)}


def one_of(*texts: str) -> Schema:
    """One of these words."""
    return {"enum": list(texts)}


def keys(names: str, of: Schema) -> Schema:
    """Several keys of one kind, their names separated by spaces."""
    return dict.fromkeys(names.split(), of)
