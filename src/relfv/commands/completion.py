"""``relfv completion``: the script a shell needs to complete commands and flags, written by shtab from the parser
itself."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from relfv.commands.flags import path_flag
from relfv.errors import InputError


def completion(parser: argparse.ArgumentParser, shell: str) -> str:
    """The completion script for ``shell``: bash, zsh or fish. Raises InputError if shtab is not installed."""
    try:
        import shtab
    except ImportError:
        raise InputError("relfv completion: needs shtab, which is not installed; run: pip install shtab") from None
    for action in _actions(parser):
        if action.type is path_flag or action.dest in ("model", "relation_csv_path"):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    return shtab.complete(parser, shell)


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
