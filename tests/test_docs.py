"""The docs' promises: CI runs their `bash` and `python` blocks (`make pages`) and builds the site strictly
(`make docs`); here every command's flags are checked, and that every page is reachable."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from relfv.cli import build_parser

PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
BLOCK = re.compile(r"^```(?:bash|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def commands_of(text: str) -> list[str]:
    """Every `relfv ...` of shell text, with lines joined that end in a backslash."""
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    starts = (re.sub(r"^(srun )?(\.venv/bin/)?", "", line.strip()) for line in lines)
    return [line.partition(" > ")[0] for line in starts if line.startswith("relfv ")]


COMMANDS = [
    (name, line)
    for name in PAGES
    for block in BLOCK.findall((ROOT / name).read_text(encoding="utf-8"))
    for line in commands_of(block)
] + [("examples", line) for line in commands_of((ROOT / "examples/slurm.sbatch").read_text())]


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_every_relfv_command_parses(page: str, line: str) -> None:
    if "--version" not in line:
        assert callable(build_parser().parse_args(shlex.split(line)[1:]).run_command), page


def test_there_are_commands_to_check() -> None:
    assert len(COMMANDS) >= 50
    assert ("examples", COMMANDS[-1][1]) == COMMANDS[-1]


@pytest.mark.parametrize("name", PAGES)
def test_relative_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    for link in re.findall(r"\]\(([^)#\s]+)[)#]", page.read_text(encoding="utf-8")):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link


def test_no_page_waits_for_a_table_to_be_put_in() -> None:
    """``@SHARES@`` stood in one."""
    waiting = {name: re.findall(r"@[A-Z_]+@", (ROOT / name).read_text(encoding="utf-8")) for name in PAGES}
    assert not {name: found for name, found in waiting.items() if found}


def test_every_page_is_in_the_navigation_once() -> None:
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    assert sorted(f"docs/{name}" for name in re.findall(r"([\w/]+\.md)$", nav, re.MULTILINE)) == PAGES


def test_every_drawing_is_readable_on_its_own_and_in_the_page() -> None:
    """On a page of the repository an image has the reader's theme; in the site it is drawn in the text's colour."""
    used = re.findall(r"images/ideas/(\w+\.svg)", (ROOT / "docs/ideas.md").read_text())
    assert sorted(used) == sorted(path.name for path in (ROOT / "docs/images/ideas").iterdir())
    for name in used:
        drawing = (ROOT / "docs/images/ideas" / name).read_text()
        assert "prefers-color-scheme:dark" in drawing
        assert 'fill="currentColor"' in drawing


def run_page(folder: Path, text: str, *flags: str) -> subprocess.CompletedProcess[str]:
    (folder / "page.md").write_text(text)
    program = [sys.executable, str(ROOT / ".ci/blocks.py"), "page.md", *flags]
    return subprocess.run(program, cwd=folder, capture_output=True, text=True)


def test_blocks_run_in_order_and_share_their_names(tmp_path: Path) -> None:
    page = (
        "```python\na = 2\n```\n```bash\necho 3 > n\n```\n"
        "```python\nprint(a * int(open('n').read()))\n```\n```output\n6\n```\n"
    )
    assert run_page(tmp_path, page).returncode == 0


@pytest.mark.parametrize(
    ("page", "said"),
    [
        ("```python\nprint(1)\n```\n```output\n2\n```\n", "page.md:4: the page shows\n2"),
        ("```bash\nfalse\n```\n", "page.md:1"),
        ("```python\nx = 1\n1 / 0\n```\n", "ZeroDivisionError"),
        ("```python\nraise SystemExit(1)\n```\n", ""),
    ],
)
def test_a_page_that_is_wrong_fails(tmp_path: Path, page: str, said: str) -> None:
    done = run_page(tmp_path, page)
    assert done.returncode == 1
    assert said in done.stderr


def test_what_is_only_shown_is_not_run(tmp_path: Path) -> None:
    assert run_page(tmp_path, "```sh\nfalse\n```\n```py\n1 / 0\n```\n").returncode == 0


def test_outputs_are_written_where_asked(tmp_path: Path) -> None:
    assert run_page(tmp_path, "a\n```python\nprint(1)\n```\n\n```output\n```\nb\n", "--write").returncode == 0
    assert (tmp_path / "page.md").read_text() == "a\n```python\nprint(1)\n```\n\n```output\n1\n```\nb\n"
