"""``relfv import``: files of other projects -> a relation CSV, and beside it an account of what was done."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relfv import __version__
from relfv.errors import InputError
from relfv.importing.cleaning import Cleaned, cleaned, q_ids_for
from relfv.importing.formats import IMPORT_FORMATS, Found, read_relations
from relfv.relations import load_relations, read_text, relation_name
from relfv.settings import Settings
from relfv.stages.trials import ineligible_reason
from relfv.store.files import sha256_bytes, write_atomic
from relfv.store.formats import csv_bytes, json_bytes
from relfv.types import Relation

log = logging.getLogger(__name__)

_ENDINGS = (".csv", ".tsv", ".json", ".txt")
_MOST_NAMED = 10


@dataclass(frozen=True)
class _Source:
    path: Path
    shown: str
    """Path of the file from what the user named, so that the account of the same files is the same anywhere."""
    form: str
    found: list[Found]


def convert(sources: Sequence[Path], out: Path, *, form: str = "auto", alternatives: str | None = None) -> list[Path]:
    """Read every file of ``sources`` (files or folders) and write ``out``, a relation CSV, and ``<out>.import.json``,
    which says for each file its hash and licence note, and for each relation what was changed or left out and why.

    ``alternatives`` parts right answers within a field; None: as the format has it. Raises InputError if nothing can be
    read, and for an ``out`` that is there with other content.
    """
    relation_name(out)
    read, unread = _read_all(sources, form)
    if not read:
        listed = "; ".join(unread[:_MOST_NAMED]) or "no file that ends in " + ", ".join(_ENDINGS)
        formats = ", ".join(IMPORT_FORMATS)
        raise InputError(f"{', '.join(map(str, sources))}: nothing to import: {listed}; formats: {formats}")
    relations = [
        (source, cleaned(found, IMPORT_FORMATS[source.form].alternatives if alternatives is None else alternatives))
        for source in read
        for found in source.found
    ]
    q_ids = q_ids_for(found.key for source in read for found in source.found)
    rows = [[q_id, a, b, its.name] for q_id, (_, its) in zip(q_ids, relations, strict=True) for a, b in its.rows]
    if not rows:
        raise InputError(f"{', '.join(map(str, sources))}: no word pair is left after cleaning; expected at least one")
    data = csv_bytes([["id", "ex_A", "ex_B", "name"], *rows])
    document = {
        "relfv_version": __version__,
        "csv": {"name": out.name, "sha256": sha256_bytes(data), "rows": len(rows)},
        "sources": [_of_source(source) for source in read],
        "not_read": unread,
        "relations": [_of_relation(q_id, *of) for q_id, of in zip(q_ids, relations, strict=True)],
    }
    account = out.with_name(f"{out.name}.import.json")
    for path, content in ((out, data), (account, json_bytes(document))):
        if path.exists() and path.read_bytes() != content:
            raise InputError(f"{path}: is there already, with other content; name another --out, or move it first")
    write_atomic(out, data)
    write_atomic(account, json_bytes(document))
    _say(document, load_relations(out))
    return [out, account]


def _read_all(sources: Sequence[Path], form: str) -> tuple[list[_Source], list[str]]:
    """Read all files. -> (the sources that could be read, for each other file why not). A file that the user named must
    be readable."""
    read: list[_Source] = []
    unread: list[str] = []
    for source in sources:
        if not source.exists():
            raise InputError(f"{source}: no such file or folder; expected files of word pairs, or folders of them")
        in_folder = source.is_dir()
        paths = sorted(p for p in source.rglob("*") if p.suffix.lower() in _ENDINGS) if in_folder else [source]
        for path in paths:
            shown = path.relative_to(source).as_posix() if in_folder else path.name
            try:
                text = read_text(path)
            except InputError as problem:
                if not in_folder:
                    raise
                unread.append(str(problem).replace(str(path), shown))
                continue
            known = read_relations(text, path.stem, form)
            if known:
                read.append(_Source(path, shown, *known))
            else:
                unread.append(f"{shown}: is in none of the formats" if form == "auto" else f"{shown}: is not {form}")
    return read, unread


def _of_source(source: _Source) -> dict[str, Any]:
    form = IMPORT_FORMATS[source.form]
    return {
        "path": source.shown,
        "sha256": sha256_bytes(source.path.read_bytes()),
        "format": source.form,
        "about": form.about,
        "licence": form.licence,
    }


def _of_relation(q_id: str, source: _Source, relation: Cleaned) -> dict[str, Any]:
    answers: dict[str, int] = {}
    for given, _ in relation.rows:
        answers[given] = answers.get(given, 0) + 1
    return {
        "q_id": q_id,
        "name": relation.name,
        "source": source.shown,
        "rows": len(relation.rows),
        "inputs": len(answers),
        "inputs_with_several_right_answers": sum(n > 1 for n in answers.values()),
        "changed": relation.changed.to_json(),
        "dropped": relation.dropped.to_json(),
    }


def _say(document: dict[str, Any], relations: Mapping[str, Relation]) -> None:
    for what in document["not_read"][:_MOST_NAMED]:
        log.warning("not read: %s", what)
    for relation in document["relations"]:
        done = [f"{kind}: {n['n']}" for how in ("changed", "dropped") for kind, n in relation[how].items()]
        pairs = relations.get(relation["q_id"])
        skipped = ineligible_reason(pairs, Settings().n_demos) if pairs else "no pair is left"
        if skipped:
            done.append(f"relfv run will skip it: {skipped}")
        log.info("%s (%s): %s", relation["q_id"], relation["source"], ", ".join([f"{relation['rows']} rows", *done]))
    for licence in dict.fromkeys(f"{source['about']}: {source['licence']}" for source in document["sources"]):
        log.info("licence, as its authors state it: %s", licence)
