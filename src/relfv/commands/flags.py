"""Flags made from the fields of ``Settings``, and from the few other values that commands take."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from relfv.errors import InputError
from relfv.settings import FLAGS, Flag, Settings, require_within

DEFAULTS = Settings()
"""The spec's settings, which flags take their defaults from."""


def add_setting(group: Any, field: str, flag: Flag, name: str) -> None:
    """Add a setting's flag. Nothing is stored unless the flag is given: the field then keeps its default, or, for a
    command that works inside a q_id's folder, what that folder was made with."""
    default = getattr(DEFAULTS, field)
    help_text = flag.help + (f"; else ${flag.environment}" if flag.environment else "")
    options: dict[str, Any] = {"dest": field, "default": argparse.SUPPRESS, "help": help_text}
    if default not in ("", None):
        options["help"] += f" (default: {default})"
    if isinstance(default, bool):
        options["action"] = argparse.BooleanOptionalAction
    elif isinstance(default, tuple):
        options |= {"type": _numbers(float if field.startswith("alpha") else int), "help": help_text}
    else:
        options |= {"type": type(default), "choices": flag.choices}
    if flag.blank:
        options |= {"nargs": "?", "const": ""}
    group.add_argument(name, **options)


def _numbers(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """Make the type of a flag of numbers separated by commas: each number kept once, ascending."""

    def parse(text: str) -> tuple[Any, ...]:
        try:
            return tuple(sorted({kind(part) for part in text.split(",")}))
        except ValueError:
            example = "1,5,10" if kind is int else "0.5,1,2"
            raise argparse.ArgumentTypeError(
                f"invalid value: {text[:40]!r}; expected numbers separated by commas, such as {example}"
            ) from None

    return parse


def settings_from(args: argparse.Namespace, base: Settings = DEFAULTS, *, environment: bool = True) -> Settings:
    """Make settings from the flags that were given, over ``base``; the ``environment`` stands between the two."""
    from relfv.models.families import SPEC_NAMES
    from relfv.models.sources import QUANTS, dtype_name

    flags = {field: value for field, value in vars(args).items() if field in FLAGS}
    given = {field: value for field, value in flags.items() if value != "" or not FLAGS[field].blank}
    for field, flag in FLAGS.items():
        asks = environment and args.command_name in flag.commands
        text = os.environ.get(flag.environment or "") if asks else None
        if text and field not in given:
            given[field] = _of_environment(text, type(getattr(DEFAULTS, field)), flag)
    for field, value in given.items():
        if isinstance(value, str) and not _is_text(value):
            raise InputError(f"--{field} {value!a}: {_NOT_TEXT}")
    if given.get("model", base.model) != base.model:  # the base's family and revision are those of its own model
        given.setdefault("model_spec", "auto")
        given.setdefault("revision", "")
    settings = replace(base, **given)
    for field, names in (("quant", QUANTS), ("model_spec", SPEC_NAMES)):
        if (value := getattr(settings, field)) not in names:
            raise InputError(f"--{field} {value!r}: expected one of {', '.join(names)}")
    return replace(settings, dtype=dtype_name(settings.dtype))


def _of_environment(text: str, kind: Callable[[str], Any], flag: Flag) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise InputError(
            f"${flag.environment} {text[:40]!r}: expected a number, since it stands for a flag that is not given; set "
            "it to one, or unset it"
        ) from None


def path_flag(text: str) -> Path:
    """Type of a flag that is a path. An empty path would be the current folder, which an unset variable in a shell does
    not mean."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError("is empty or has a NUL in it; expected a path")
    if not _is_text(text):
        raise argparse.ArgumentTypeError(f"{text!a}: {_NOT_TEXT}")
    return Path(text)


_NOT_TEXT = "is not UTF-8; expected a name that is, so rename the file or folder"


def _is_text(text: str) -> bool:
    """False for arguments that the system gave as bytes that are not UTF-8: JSON files could not name them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """Make the type of a flag that is a whole number within bounds and no field of Settings, which has its own
    bounds."""

    def parse(text: str) -> int:
        try:
            require_within("", number := int(text), low, high)
        except (ValueError, InputError):
            raise argparse.ArgumentTypeError(
                f"invalid value: {text[:40]!r}; expected a whole number from {low} to {high}"
            ) from None
        return number

    return parse


def q_ids_from(text: str) -> tuple[str, ...] | None:
    q_ids = tuple(part.strip() for part in text.split(",") if part.strip())
    if not q_ids:
        raise InputError("--q_list: is empty; expected q_ids separated by commas, or all")
    return None if q_ids == ("all",) else q_ids
