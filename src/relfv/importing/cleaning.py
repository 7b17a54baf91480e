"""Words as a relation CSV may hold them, and an account of everything that was changed or left out to get there."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from relfv.importing.formats import Found
from relfv.relations import LINE_BREAKS_AND_CONTROLS, is_q_id

_EXAMPLES = 5


@dataclass
class Account:
    """Account of what happened to the pairs of one relation: for each kind of change how often, and the first few
    examples."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, example: str) -> None:
        """Count one more case of ``kind``, with its ``example``."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        shown = self.examples.setdefault(kind, [])
        if len(shown) < _EXAMPLES:
            shown.append(example[:120])

    def to_json(self) -> dict[str, Any]:
        """The account as JSON: kind -> count and examples."""
        return {kind: {"n": n, "examples": self.examples[kind]} for kind, n in self.counts.items()}


@dataclass(frozen=True)
class Cleaned:
    """One cleaned relation, ready for the CSV."""

    name: str
    rows: tuple[tuple[str, str], ...]
    """Input and answer; an input with several right answers has a row for each."""
    changed: Account
    dropped: Account


def cleaned(found: Found, alternatives: str) -> Cleaned:
    """Clean the pairs of ``found``: answers parted at ``alternatives`` (unless empty), line breaks and control
    characters turned into spaces, and without outer spaces, blank words and repetitions."""
    changed, dropped = Account(), Account()
    rows: dict[tuple[str, str], None] = {}
    for what in found.unreadable:
        dropped.add("no word pair", what)
    for given, answers in found.pairs:
        parted = [part for answer in answers for part in (answer.split(alternatives) if alternatives else [answer])]
        if len(parted) > len(answers):
            changed.add(f"answers parted at {alternatives!r}", "; ".join(answers))
        word = _word(given, changed)
        for answer in parted:
            row = word, _word(answer, changed)
            if not all(row):
                dropped.add("blank word", f"{given!a} -> {answer!a}")
            elif row in rows:
                dropped.add("repeated pair", f"{row[0]} -> {row[1]}")
            else:
                rows[row] = None
    name = " ".join(_word(found.name, Account()).split())
    return Cleaned(name, tuple(rows), changed, dropped)


def _word(text: str, changed: Account) -> str:
    flat = "".join(" " if unicodedata.category(char) in LINE_BREAKS_AND_CONTROLS else char for char in text)
    if flat.strip() != text.strip():
        flat = " ".join(flat.split())
        changed.add("line break or control character replaced by a space", ascii(text.strip()))
    elif text != text.strip():
        changed.add("outer spaces taken off", ascii(text))
    return flat.strip()


def q_ids_for(keys: Iterable[str]) -> list[str]:
    """Make a q_id for each key: other characters become ``_``, and a name that is taken, in whatever case, gets a
    number."""
    taken: set[str] = set()
    q_ids = []
    for key in keys:
        base = re.sub(r"[^A-Za-z0-9.]+", "_", key).strip("._")[:56] or "relation"
        base = base if is_q_id(base) else f"{base}_"
        q_id, n = base, 1
        while q_id.lower() in taken:
            n += 1
            q_id = f"{base}_{n}"
        taken.add(q_id.lower())
        q_ids.append(q_id)
    return q_ids
