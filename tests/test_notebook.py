"""examples/tutorial.ipynb shows what docs/tutorial.md says, whose outputs `make pages` checks."""

from __future__ import annotations

import base64
import json
import sys

import pytest

from conftest import ROOT


def test_the_notebook_is_the_tutorial_with_its_outputs_and_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / ".ci"), *sys.path])
    import notebook

    kept = json.loads((ROOT / "examples/tutorial.ipynb").read_text(encoding="utf-8"))["cells"]
    expected = notebook.cells((ROOT / "docs/tutorial.md").read_text(encoding="utf-8"))
    assert [cell["source"] for cell in kept] == [cell["source"] for cell in expected], "run python .ci/notebook.py"
    pictures = 0
    for cell, true in zip(kept, expected, strict=True):
        assert (
            "".join(t for out in cell.get("outputs", ()) for t in out.get("text", ())).split()
            == "".join(t for out in true.get("outputs", ()) for t in out["text"]).split()
        )
        for out in cell.get("outputs", ()):
            if "data" in out:
                pictures += base64.b64decode(out["data"]["image/png"]).startswith(b"\x89PNG")
    assert pictures == len(notebook.PICTURES)
