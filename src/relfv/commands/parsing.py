"""A parser whose errors are one line that points to the right help and names the flag that was probably meant."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from relfv.logs import printable, shortened


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with defaults beside each flag that has one, and examples at the end, as they are."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, "", False) or "(default:" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Parser that reports errors in one line, with exit code 2 and no usage dump; flags cannot be abbreviated."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", _Help)
        super().__init__(*args, **kwargs)
        self.set_defaults(parser=self)  # a command's own parser is asked last, and sets itself

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Report unknown arguments as an error of the command that was given, not of the whole program."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            found.parser.error(f"unrecognized arguments: {' '.join(unknown)}{found.parser.meant_by(unknown)}")
        return found

    def meant_by(self, unknown: Iterable[str]) -> str:
        """The flags of this command that look like the unknown ones, as a question."""
        flags = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
        return _did_you_mean((word.partition("=")[0] for word in unknown if word.startswith("-")), flags, 0.75)

    def error(self, message: str) -> NoReturn:
        if choice := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            message += _did_you_mean([choice[1]], [word.strip("' ") for word in choice[2].split(",")], 0.6)
        self.exit(2, printable(shortened(f"{self.prog}: error: {message} (see {self.prog} --help)")) + "\n")


_SHORT = 3
"""Number of letters of words that are too short to look like another: gpu is not a cpu."""


def _did_you_mean(words: Iterable[str], known: Sequence[str], cutoff: float) -> str:
    found = []
    for word in words:
        begun = [one for one in known if one.startswith(word)]
        close = get_close_matches(word, known, n=1, cutoff=cutoff) if len(word) > _SHORT else []
        found += begun if len(begun) == 1 else close
    return f"; did you mean {', '.join(found)}?" if found else ""
