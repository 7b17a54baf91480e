from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import relfv
from conftest import ROOT

HEAVY = ("torch", "transformers", "scipy.stats", "matplotlib", "pandas", "numpy")


def loaded(*lines: str) -> str:
    script = "; ".join(["import sys", *lines, f"print([n for n in {HEAVY} if n in sys.modules])"])
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_importing_relfv_imports_nothing() -> None:
    assert loaded("import relfv", "relfv.InputError", "dir(relfv)") == "[]"


def test_results_and_their_vectors_are_read_without_torch(finished: Path) -> None:
    read = f"fv = relfv.load({str(finished)!r})['A1'].function_vector"
    assert loaded("import relfv", read, "fv.vector, fv.by_layer, fv.heads") == "['numpy']"


def test_every_name_is_there_and_no_other() -> None:
    for name in relfv._FROM:
        assert getattr(relfv, name) is not None
        assert name in dir(relfv)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = relfv.nothing  # type: ignore[attr-defined]


def test_type_checkers_are_told_that_the_package_is_typed() -> None:
    assert (Path(relfv.__file__).parent / "py.typed").is_file()
