"""Where tests lie: CONTRIBUTING.md says it."""

from __future__ import annotations

from pathlib import Path

from conftest import ROOT

TESTS, PACKAGE = ROOT / "tests", ROOT / "src/relfv"


def names_below(folder: Path, pattern: str) -> list[Path]:
    return [path.relative_to(folder) for path in sorted(folder.rglob(pattern))]


def test_a_test_named_for_a_module_lies_where_the_module_does() -> None:
    modules = set(names_below(PACKAGE, "*.py")) - set(names_below(PACKAGE, "__init__.py"))
    tested = {test.with_name(test.name.removeprefix("test_")) for test in names_below(TESTS, "test_*.py")}
    elsewhere = {path for path in tested if path.name in {module.name for module in modules}} - modules
    assert not elsewhere
    assert len(tested & modules) > 80


def test_folders_of_tests_are_those_of_the_package() -> None:
    folders = {test.parent for test in names_below(TESTS, "test_*.py")}
    assert [str(folder) for folder in folders if not (PACKAGE / folder / "__init__.py").is_file()] == []


def test_what_tests_share_is_in_one_folder() -> None:
    others = [path for path in names_below(TESTS, "*.py") if not path.name.startswith("test_")]
    assert {str(path.parts[0]) for path in others if path.name != "conftest.py"} == {"support", "fuzz"}
