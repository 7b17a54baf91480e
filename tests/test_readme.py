"""The README's promises: CI runs its `bash` blocks; here every command's flags and every link are checked."""

from __future__ import annotations

import re
import shlex

import pytest

from conftest import ROOT
from relfv.cli import build_parser

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(bash|sh)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
COMMANDS = [line for _, block in BLOCKS for line in block.splitlines() if "/relfv " in line]


@pytest.mark.parametrize("line", COMMANDS)
def test_every_relfv_command_parses(line: str) -> None:
    args = build_parser().parse_args(shlex.split(line)[1:])
    assert callable(args.run_command)


def test_there_are_commands_to_check() -> None:
    assert len(COMMANDS) >= 4


@pytest.mark.parametrize(
    "name",
    ["README.md", "CONTRIBUTING.md", "docs/artifacts.md", "docs/demo_model.md", "bench/RESULTS.md", "bench/HISTORY.md"],
)
def test_relative_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    text = page.read_text()
    links = re.findall(r"\]\(([^)#\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for link in links:
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link


def test_the_annotated_tree_is_the_tree() -> None:
    block = re.search(r"## Where things are\n\n```\n(.*?)```", README, re.DOTALL)
    assert block
    for line in block.group(1).splitlines():
        name = line.split()[0]
        folder = ROOT / "src/relfv" if line.startswith("  ") else ROOT
        assert (folder / name).exists(), name
