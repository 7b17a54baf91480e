"""docs/stages.md is the table of stages, written out; ``--write-stages`` makes it again."""

from __future__ import annotations

import pytest

from conftest import ROOT
from relfv.stages.table import STAGES

HEAD = """# The stages

Every q_id goes through these, in this order. A stage reads what earlier ones have written to `artifacts/`, and its files are on
disk, with their hashes in `qid_status.json`, before the next begins (Step6's layers are recorded eight at a time). Those that are
*extra* go beyond the spec: `--extras none` leaves them out, and a later run adds them. A restart repeats a stage whose files, or those it read, are
missing, damaged or newer. It depends on the settings named here and, through the files it reads, on those of
the stages that wrote them. A single command may still choose a setting that no stage begun so far depends on.

Written by the tests from the declarations in `src/relfv/stages/` (`pytest tests/stages/test_stages_page.py --write-stages`).

| stage | what it does | in | reads | writes | settings |
|---|---|---|---|---|---|
"""  # noqa: E501


def page() -> str:
    rows = []
    for stage in STAGES:
        marks = [mark for mark, is_so in (("on request", stage.asked is not None), ("extra", stage.extra)) if is_so]
        name = ", ".join([f"`{stage.name}{'<l>' if stage.per_layer else ''}`", *marks])
        reads, writes = (
            ", ".join(f"`{file.name}`".replace("{q_id}", "<Q>").replace("{layer}", "<l>") for file in files)
            or "the CSV"
            for files in (stage.reads, stage.writes)
        )
        file = f"{stage.run.__module__.rpartition('.')[2]}.py"
        where = f"[`{file}`](../src/relfv/stages/{file})"
        rows.append(f"| {name} | {stage.about} | {where} | {reads} | {writes} | {', '.join(stage.settings)} |\n")
    return HEAD + "".join(rows)


def test_the_page_of_stages_is_the_table(request: pytest.FixtureRequest) -> None:
    path = ROOT / "docs/stages.md"
    if request.config.getoption("--write-stages"):
        path.write_text(page())
    assert path.read_text() == page(), "pytest tests/stages/test_stages_page.py --write-stages writes it again"
