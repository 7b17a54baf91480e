"""The forms in which other projects publish relations, each told from the others by its content.

A reader takes a file's text and the file's name without its ending, and gives its relations, or None for a file of
another form. No data set is part of relfv; the licence notes repeat what their authors say, and are no advice.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relfv.errors import InputError
from relfv.relations import columns_of, separator_of


@dataclass(frozen=True)
class Found:
    """One relation as its file has it, uncleaned."""

    key: str
    """The text that its q_id is made from."""
    name: str
    """The relation in words, or its key where the file has none."""
    pairs: tuple[tuple[str, tuple[str, ...]], ...]
    """Inputs, each with the answers that are right for it, uncleaned."""
    unreadable: tuple[str, ...] = ()
    """Entries that are no word pair, each in a few words."""


@dataclass(frozen=True)
class Format:
    """One form of relation files, and where it comes from."""

    about: str
    licence: str
    read: Callable[[str, str], list[Found] | None]
    alternatives: str = ""
    """Separator of several right answers in one field; empty if there is none."""


def _json_pairs(entries: Iterable[Any], given: str, wanted: str) -> tuple[list[Any], list[str]]:
    """Split entries into pairs, {given: word, wanted: word or words}, and those that are no pairs."""
    pairs, unreadable = [], []
    for number, entry in enumerate(entries, start=1):
        answers = entry.get(wanted) if isinstance(entry, dict) else None
        answers = answers if isinstance(answers, list) else [answers]
        words = [entry.get(given) if isinstance(entry, dict) else None, *answers]
        if all(isinstance(word, (str, int, float)) and not isinstance(word, bool) for word in words):
            pairs.append((str(words[0]), tuple(map(str, words[1:]))))
        else:
            unreadable.append(f"entry {number} has no {given} and {wanted} that are text")
    return pairs, unreadable


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _todd(text: str, stem: str) -> list[Found] | None:
    """Read a list of {"input": ..., "output": ...}, one relation in each file."""
    entries = _parsed(text)
    if not isinstance(entries, list):
        return None
    pairs, unreadable = _json_pairs(entries, "input", "output")
    return [Found(stem, re.sub(r"[-_]+", " ", stem), tuple(pairs), tuple(unreadable))] if pairs else None


def _lre(text: str, stem: str) -> list[Found] | None:
    """Read {"name": ..., "samples": [{"subject": ..., "object": ...}]}, one relation in each file."""
    content = _parsed(text)
    samples = content.get("samples") if isinstance(content, dict) else None
    if not isinstance(samples, list):
        return None
    pairs, unreadable = _json_pairs(samples, "subject", "object")
    name = str(content.get("name") or stem)
    return [Found(stem, name, tuple(pairs), tuple(unreadable))] if pairs else None


def _google(text: str, _: str) -> list[Found] | None:
    """Read ``: section`` lines, then four words a line: two pairs of the section's relation. A pair stands in many
    lines, and counts once."""
    if not text.lstrip().startswith(":"):
        return None
    pairs: dict[str, dict[tuple[str, str], None]] = {}
    unreadable: dict[str, list[str]] = {}
    section = ""
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split()
        if line.startswith(":"):
            section = line[1:].strip()
            pairs.setdefault(section, {})
        elif len(words) == 4:
            pairs[section] |= {(words[0], words[1]): None, (words[2], words[3]): None}
        elif words:
            unreadable.setdefault(section, []).append(f"line {number} has {len(words)} words, not 4")
    return [
        Found(name, name.replace("-", " "), tuple((a, (b,)) for a, b in its), tuple(unreadable.get(name, ())))
        for name, its in pairs.items()
    ]


def _bats(text: str, stem: str) -> list[Found] | None:
    """Read ``word<tab>answer/answer`` lines; the file is called ``D01 [noun - plural_reg]``."""
    lines = [line for line in text.splitlines() if line.strip()]
    fields = [line.split("\t") if "\t" in line else line.split() for line in lines]
    if not fields or any(len(its) != 2 for its in fields) or _parsed(text) is not None:
        return None
    in_brackets = re.search(r"\[(.*)\]", stem)
    return [Found(stem, in_brackets[1] if in_brackets else stem, tuple((a, (b,)) for a, b in fields))]


def _csv(text: str, stem: str) -> list[Found] | None:
    """Read a relation CSV, strict only about its header: rows that ``relfv run`` refuses are cleaned or left out."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator_of(text))
    try:
        column, rows = columns_of(Path(stem), next(reader, None)), [(reader.line_num, row) for row in reader]
    except (InputError, csv.Error):
        return None
    pairs: dict[str, list[tuple[str, tuple[str, ...]]]] = {}
    unreadable: dict[str, list[str]] = {}
    for line, row in rows:
        q_id = row[column["q_id"]].strip() if len(row) == len(column) else ""
        if q_id:
            pairs.setdefault(q_id, []).append((row[column["input"]], (row[column["output"]],)))
        elif any(cell.strip() for cell in row):
            why = "no q_id" if len(row) == len(column) else f"{len(row)} columns, not {len(column)}"
            unreadable.setdefault(next(reversed(pairs), ""), []).append(f"the row that ends in line {line}: {why}")
    return [Found(q_id, q_id, tuple(its), tuple(unreadable.get(q_id, ()))) for q_id, its in pairs.items()]


IMPORT_FORMATS = {
    "csv": Format("a relation CSV", "that of the file", _csv),
    "todd": Format(
        "Todd et al. (ICLR 2024), JSON lists of input and output",
        "MIT for the repository; its README names where each data set comes from",
        _todd,
    ),
    "lre": Format(
        "LRE, Hernandez et al. (ICLR 2024), JSON with samples of subject and object", "MIT for the repository", _lre
    ),
    "google": Format(
        "questions-words.txt, Mikolov et al. (2013), two pairs a line", "Apache-2.0, as part of word2vec", _google
    ),
    "bats": Format(
        "BATS 3.0, Gladkova et al. (2016), word, tab, answers",
        "CC BY-NC 4.0: not for commercial use, and not to be passed on as part of something that is",
        _bats,
        alternatives="/",
    ),
}
"""The formats by the name that ``--format`` takes, in the order in which they are tried."""


def read_relations(text: str, stem: str, wanted: str) -> tuple[str, list[Found]] | None:
    """Read relations. -> the name of the first format, or of the ``wanted`` one, that ``text`` has, and its relations;
    None if none fits."""
    for name in IMPORT_FORMATS if wanted == "auto" else [wanted]:
        found = IMPORT_FORMATS[name].read(text, stem)
        if found:
            return name, found
    return None
