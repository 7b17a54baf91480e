"""``relfv compare``: finished results side by side, the first against each of the others; no model is opened."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from relfv.errors import InputError, RelfvError, in_words
from relfv.logs import show
from relfv.relations import named
from relfv.report.comparison import comparison_page, comparison_svg
from relfv.settings import FLAGS
from relfv.stages.comparison import Side, over_q_ids, side_of
from relfv.stages.comparison import compare as compare_sides
from relfv.store.files import require_folder, write_together
from relfv.store.formats import csv_bytes, csv_cell
from relfv.store.status import QidStatus, read_status
from relfv.store.statuses import find_statuses

log = logging.getLogger(__name__)

_ALL = "all"
"""Stands in place of a q_id where all q_ids are taken together."""
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def compare(folders: Sequence[Path], q_list: Sequence[str] | None, out_dir: Path) -> int:
    """Write compare.csv, compare.svg and compare.html into ``out_dir``: the q_ids that the first of ``folders`` shares
    with each other one, or those of ``q_list``. Returns the exit code.

    Raises InputError for fewer than two folders, and where they share no completed q_id.
    """
    if not 2 <= len(folders) <= len(_LETTERS):
        raise InputError(f"relfv compare: {len(folders)} folder(s); expected two to {len(_LETTERS)}, to compare")
    require_folder(out_dir, "--out_dir")
    found = [_completed(folder, q_list) for folder in folders]
    pairs = [_against(found, other, folders) for other in range(1, len(folders))]
    if missing := [q_id for q_id in q_list or () if not any(q_id == row["q_id"] for rows in pairs for row in rows)]:
        raise InputError(f"--q_list: {named(missing)} not completed in each of {', '.join(map(str, folders))}")
    rows = [row for of_pair in pairs for row in of_pair]
    sides = [_described(letter, folder, of) for letter, folder, of in zip(_LETTERS, folders, found, strict=False)]
    written = write_together(
        {
            out_dir / "compare.csv": csv_bytes(
                [[*rows[0]], *([csv_cell(value) for value in row.values()] for row in rows)]
            ),
            out_dir / "compare.svg": comparison_svg(rows, standalone=True).encode(),
            out_dir / "compare.html": comparison_page(sides, rows).encode(),
        }
    )
    show("\n".join(map(str, written)))
    return 0


Found = dict[tuple[str, str], QidStatus]
"""(relation, q_id) -> its status; the relation is empty where a single one was given."""


def _completed(folder: Path, q_list: Sequence[str] | None) -> Found:
    """The completed q_ids at or below ``folder``. Raises InputError if there is none."""
    there, left_out = {}, []
    for path in find_statuses(folder):
        relation, q_id = path.absolute().parent.parent.name, path.absolute().parent.name
        if q_list is not None and q_id not in q_list:
            continue
        try:
            status = read_status(path)
        except RelfvError as problem:
            log.warning("%s", problem)
            continue
        if status and status.status == "completed":
            there[relation, q_id] = status
        else:
            left_out.append(q_id)
    if left_out:
        log.info("%s: not completed and left out: %s", folder, named(left_out))
    if not there:
        raise InputError(
            f"{folder}: no completed q_id{' of --q_list' if q_list else ''} here; expected results of relfv run"
        )
    if len({relation for relation, _ in there}) == 1:  # the sides' names for one relation may differ
        return {("", q_id): status for (_, q_id), status in there.items()}
    return there


def _against(found: Sequence[Found], other: int, folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Rows of the comparison: one for each q_id that the first and this other one share, and one for all of them
    together."""
    rows = []
    shared = [key for key in found[0] if key in found[other]]
    for key in shared:
        relation, q_id = key
        try:
            one, two = (_side(found[side][key]) for side in (0, other))
        except RelfvError as problem:
            log.warning("%s left out: %s", q_id, problem)
            continue
        numbers = compare_sides(one, two)
        if not numbers["n_queries"]:
            log.warning(
                "%s: not one query is the same in %s and %s; only heads and vectors are compared",
                q_id,
                folders[0],
                folders[other],
            )
        rows.append({"a": "A", "b": _LETTERS[other], "relation": relation, "q_id": q_id, **numbers})
    if not rows:
        raise InputError(
            f"{folders[0]} and {folders[other]}: share no completed q_id; the first has {_named(found[0])}, the other "
            f"{_named(found[other])}"
        )
    alone = [q_id for of in (found[0], found[other]) for _, q_id in of.keys() - set(shared)]
    if alone:
        log.info("in A or %s alone, and not compared: %s", _LETTERS[other], named(sorted(alone)))
    if len(rows) > 1:
        rows.append(
            dict.fromkeys(rows[0]) | {"a": "A", "b": _LETTERS[other], "relation": "", "q_id": _ALL} | over_q_ids(rows)
        )
    return rows


def _named(found: Found) -> str:
    return named([q_id for _, q_id in found])


def _side(status: QidStatus) -> Side:
    try:
        return side_of(status)
    except RelfvError:
        raise
    except (KeyError, TypeError, ValueError, IndexError) as problem:
        raise InputError(
            f"{status.artifacts_dir}: its files are not as relfv writes them ({in_words(problem)})"
        ) from None


def _described(letter: str, folder: Path, found: Found) -> dict[str, Any]:
    """Description of one side: its model and every setting, with all values where there are several."""
    settings: dict[str, list[str]] = {}
    for name in FLAGS:
        values = dict.fromkeys(str(getattr(status.settings, name)) for status in found.values())
        settings[name] = list(values)
    return {"letter": letter, "folder": str(folder), "settings": {name: ", ".join(of) for name, of in settings.items()}}
