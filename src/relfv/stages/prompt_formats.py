"""Prompt formats beside the spec's: a few built in, and those of a JSON file.

The file: ``{"<q_id>, or * for all": {"<name>": "<a pair>" or {"prompt": "<a pair>", "separator", "introduction",
"demos"}}}``; fields as in ``PromptFormat``. ``{relation}`` in an introduction is the relation's name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from relfv.errors import InputError
from relfv.settings import Settings
from relfv.stages.prompts import SPEC_FORMAT, PromptFormat

BUILT_IN: dict[str, dict[str, Any]] = {
    "arrow": {"prompt": "{input} -> {output}"},
    "colon": {"prompt": "{input}: {output}"},
    "instruction": {"introduction": "Relation: {relation}\n\n", "prompt": SPEC_FORMAT.prompt, "demos": False},
}
_KINDS: dict[str, type] = {"prompt": str, "separator": str, "introduction": str, "demos": bool}
_NAME = re.compile(r"[A-Za-z0-9_-]{1,40}")
_LARGEST_FILE = 1 << 20


def with_formats(settings: Settings) -> Settings:
    """``settings`` with ``formats`` spelt out, so that they say what a file said. Raises InputError."""
    return replace(settings, formats=resolved_formats(settings.formats))


def resolved_formats(asked: str) -> str:
    """The formats asked for, as in ``arrow,mine.json`` or an earlier result of this function, as one JSON object; empty
    for none. Raises InputError, naming the format and what is wrong."""
    if asked.lstrip().startswith("{"):
        defined = _checked(_parsed(asked, "--formats"), "--formats")
    else:
        defined = {}
        for part in filter(None, (part.strip() for part in asked.split(","))):
            for q_id, its in _of_part(part).items():
                defined[q_id] = {**defined.get(q_id, {}), **its}
    return json.dumps(defined, sort_keys=True, ensure_ascii=False) if defined else ""


def formats_of(resolved: str, q_id: str, relation_name: str) -> tuple[list[PromptFormat], dict[str, str]]:
    """-> (the formats of a q_id, the spec's first; those that it cannot have, with the reason)."""
    defined = json.loads(resolved or "{}")
    found, left_out = [SPEC_FORMAT], {}
    for name, fields in {**defined.get("*", {}), **defined.get(q_id, {})}.items():
        one = PromptFormat(name, **fields)
        if "{relation}" in one.introduction and not relation_name:
            left_out[name] = "its introduction needs the relation's name, and the CSV has none"
        else:
            found.append(replace(one, introduction=one.introduction.replace("{relation}", relation_name)))
    return found, left_out


def names_of(resolved: str, q_id: str) -> list[str]:
    """The names of the formats that are asked for of a q_id, the spec's first."""
    defined = json.loads(resolved or "{}")
    return [SPEC_FORMAT.name, *{**defined.get("*", {}), **defined.get(q_id, {})}]


def q_ids_with_formats(resolved: str) -> list[str]:
    """The q_ids that have formats of their own."""
    return [q_id for q_id in json.loads(resolved or "{}") if q_id != "*"]


def _of_part(part: str) -> dict[str, dict[str, Any]]:
    if part in BUILT_IN:
        return {"*": {part: BUILT_IN[part]}}
    path = Path(part)
    if not path.is_file():
        names = ", ".join(BUILT_IN)
        raise InputError(f"--formats {part!r}: expected one of {names}, or a JSON file, and there is no such file")
    if path.stat().st_size > _LARGEST_FILE:
        raise InputError(f"{path}: is larger than 1 MiB; expected a JSON file of prompt formats")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({problem})") from None
    return _checked(_parsed(text, str(path)), str(path))


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise InputError(f"{where}: is not JSON ({problem}); expected q_ids, or *, with their formats") from None


def _checked(document: Any, where: str) -> dict[str, dict[str, Any]]:
    if not isinstance(document, dict) or not all(isinstance(its, dict) for its in document.values()):
        raise InputError(f'{where}: expected {{"<q_id or *>": {{"<name>": "<a pair>"}}}}')
    return {q_id: {name: _fields(one, f"{where}: {q_id}, {name}", name) for name, one in its.items()}
            for q_id, its in document.items()}  # fmt: skip


def _fields(one: Any, where: str, name: str) -> dict[str, Any]:
    fields: Mapping[str, Any] = {"prompt": one} if isinstance(one, str) else one
    if not _NAME.fullmatch(name) or name == SPEC_FORMAT.name:
        raise InputError(f"{where}: expected a name of letters, digits, - and _, other than {SPEC_FORMAT.name!r}")
    if not isinstance(fields, dict) or not fields.keys() <= _KINDS.keys():
        raise InputError(f"{where}: expected a text, or an object of some of {', '.join(_KINDS)}")
    for key, value in fields.items():
        if not isinstance(value, _KINDS[key]):
            raise InputError(f"{where}: {key} is {value!r}; expected {'true or false' if key == 'demos' else 'a text'}")
    prompt = fields.get("prompt", "")
    before, output, after = prompt.partition("{output}")
    if before.count("{input}") != 1 or not output or "{input}" in after or "{output}" in after:
        raise InputError(f"{where}: prompt is {prompt!r}; expected {{input}} once, and after it {{output}} once")
    if not before.endswith(" ") or before[:-1] != before[:-1].rstrip():
        raise InputError(
            f"{where}: prompt is {prompt!r}; expected one space before {{output}}, and no other white space: it "
            "belongs to the answer's first token"
        )
    if not fields.get("demos", True) and not fields.get("introduction"):
        raise InputError(f"{where}: has no demos; expected an introduction, which corrupted prompts are without")
    return dict(fields)
