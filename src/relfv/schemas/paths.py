"""What a path of keys leads to in an artifact, by the artifact's schema alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from relfv.schemas import schema_of
from relfv.schemas.notation import ANY, Schema

Path = Sequence[str | int]
"""Names, and positions in lists; of a key that is a number, such as a layer's, the number."""


def kinds_at(artifact: str, path: Path) -> set[str]:
    """``number``, ``text``, ``flag``: what a value at ``path`` may be; all where the schema does not say. Empty for
    lists and objects. Raises LookupError, in words, for a path that no such artifact has."""
    here = [schema_of(artifact)]
    for n, key in enumerate(path):
        here = list(_alternatives(here))
        below = [found for schema in here if (found := _below(schema, key)) is not None]
        if not below:
            there = [name for schema in here for name in schema.get("properties", {})]
            there += ["a position in a list" for schema in here if "items" in schema]
            where = f" below {'.'.join(map(str, path[:n]))}" if n else ""
            raise LookupError(f"{artifact} has no {key!r}{where}; expected {', '.join(there) or 'nothing more'}")
        here = below
    return {kind for schema in _alternatives(here) for kind in _kinds(schema)}


def _alternatives(schemas: Iterable[Schema]) -> Iterable[Schema]:
    for schema in schemas:
        yield from _alternatives(schema["anyOf"]) if "anyOf" in schema else [schema]


def _below(schema: Schema, key: str | int) -> Schema | None:
    if schema == ANY:
        return ANY
    if "items" in schema:
        return schema["items"] if isinstance(key, int) else None
    return schema.get("properties", {}).get(key, schema.get("additionalProperties"))


def _kinds(schema: Schema) -> set[str]:
    if schema == ANY:
        return {"number", "text", "flag"}
    if "enum" in schema:
        return {"text" if isinstance(one, str) else "number" for one in schema["enum"]}
    named = {"integer": "number", "number": "number", "string": "text", "boolean": "flag"}
    return {named[schema["type"]]} if schema["type"] in named else set()
