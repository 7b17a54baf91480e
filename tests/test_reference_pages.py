"""docs/reference/: command line, settings, schemas and Python names as the code has them; ``--write-reference`` makes
the pages again."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator

import pytest

import relfv
from conftest import ROOT
from relfv.cli import build_parser
from relfv.schemas import ARTIFACTS, schema_of
from relfv.settings import FLAGS, Settings

HOW = "Written by the tests from the code (`pytest tests/test_reference_pages.py --write-reference`)."


def commands_page() -> str:
    (commands,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    parts = [
        f"# The command line\n\n{HOW} `relfv COMMAND --help` says the same.\n\nExit codes: 0 done; 1 a run failed, or "
        "results do not hold; 2 nothing was computed, what was given is wrong; 130 and 143 stopped by SIGINT and "
        "SIGTERM, 138 by SIGUSR1. What each setting means beyond its line here: [Settings](settings.md).\n"
    ]
    for name, parser in commands.choices.items():
        about = " ".join((parser.description or "").split())
        parts.append(f"\n## relfv {name}\n\n{cell(about)}.\n\n")
        if examples := (parser.epilog or "").removeprefix("examples:").split("\n"):
            shown = "\n".join(line.strip() for line in examples if line.strip())
            parts.append(f"```sh\n{shown}\n```\n\n" if shown else "")
        parts.append("| | meaning | default |\n|---|---|---|\n")
        parts.extend(flag_rows(parser))
    return "".join(parts)


def flag_rows(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        # Settings state their default in their help; the others keep it apart.
        help_text, _, stated = (action.help or "").partition(" (default: ")
        given = action.default if action.default not in (None, False, argparse.SUPPRESS) else ""
        default = stated.removesuffix(")") or given
        names = ", ".join(f"`{name}`" for name in action.option_strings) or f"`{action.metavar or action.dest}`"
        choices = f" One of {', '.join(f'`{choice}`' for choice in action.choices)}." if action.choices else ""
        yield f"| {names} | {cell(help_text)}.{choices} | {f'`{default}`' if default != '' else ''} |\n"


def settings_page() -> str:
    defaults = Settings()
    rows = []
    for name, flag in FLAGS.items():
        value = getattr(defaults, name)
        bounds = f" {flag.low:g} to {flag.high:g}." if abs(flag.high) < 1e18 else ""
        choices = f" One of {', '.join(f'`{choice}`' for choice in flag.choices)}." if flag.choices else ""
        marks = [mark for mark, is_so in (("spec", flag.fixed), ("identity", flag.identity)) if is_so]
        shown = f"`{value}`" if value not in ("", ()) else ""
        rows.append(
            f"| `{name}` | {shown} | {cell(flag.help)}.{choices}{bounds} | {', '.join(flag.commands)} | "
            f"{f'`{flag.environment}`' if flag.environment else ''} | {', '.join(marks)} |\n"
        )
    return (
        f"# Settings\n\n{HOW}\n\nA setting is a flag of the commands named (`--topk 10`), a keyword of `relfv.run` "
        "(`topk=10`), and a key in `run_manifest.json`. Where the flag is not given, the environment variable counts, "
        "then the default. *spec*: fixed by the experiment's specification; another value is named as a departure in "
        "the manifest and on the page. *identity*: part of the experiment; results of another value are not continued "
        "but refused.\n\n| setting | default | meaning | commands | environment | |\n|---|---|---|---|---|---|\n"
    ) + "".join(rows)


def schemas_page() -> str:
    head = (
        f"# JSON Schemas\n\n{HOW}\n\nThe form of every JSON file of a run, as JSON Schema (draft 2020-12), also "
        'from Python: `relfv.schemas.schema_of("answers.json")`. What the files hold: [Files](../artifacts.md). Each '
        "file is checked against its schema in the tests.\n\n| file | what it is | keys | schema |\n|---|---|---|---|\n"
    )
    rows = []
    for name in ARTIFACTS:
        schema = schema_of(name)
        keys = ", ".join(f"`{key}`" for key in schema.get("properties", {}))
        about = schema["description"].partition(" Floats are finite")[0]
        link = f"[schema](../../src/relfv/schemas/json/{name}.schema.json)"
        rows.append(f"| `{name}` | {cell(about)} | {keys} | {link} |\n")
    return head + "".join(rows)


def cell(text: str) -> str:
    """Text in a table's cell: what would be markup or HTML is code."""
    text = text.replace("|", "\\|").removesuffix(".")
    return re.sub(r"((?:[^\s`]*<[\w ]+>)+[^\s`,;]*|(?<![`\w])--\w+(?:=[-\w.,]+)?|\$[A-Z_]+)", r"`\1`", text)


PAGES = {"cli.md": commands_page, "settings.md": settings_page, "schemas.md": schemas_page}


@pytest.mark.parametrize("name", list(PAGES))
def test_the_reference_is_the_code(name: str, request: pytest.FixtureRequest) -> None:
    path, page = ROOT / "docs/reference" / name, PAGES[name]()
    if request.config.getoption("--write-reference"):
        path.write_text(page)
    assert path.read_text() == page, "pytest tests/test_reference_pages.py --write-reference writes it again"


def test_the_page_of_python_names_has_every_public_name() -> None:
    page = (ROOT / "docs/reference/python.md").read_text()
    shown = set(re.findall(r"^::: relfv\.(?:\w+\.)*(\w+)$", page, re.MULTILINE))
    assert set(relfv._FROM) <= shown
