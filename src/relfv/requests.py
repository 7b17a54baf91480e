"""Requests: what a run may ask for beyond what completes a q_id (sweeps, draws, formats, studies). A request made once
stays."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from relfv.settings import STUDIES, SWEEPS, Settings


def with_requests_of(settings: Settings, other: Settings) -> Settings:
    """``settings`` with the requests of both, their own and those of ``other``."""
    studies = settings.studies | other.studies
    return replace(
        settings,
        replicates=max(settings.replicates, other.replicates),
        formats=merged_formats(settings.formats, other.formats),
        extras=",".join(["all", *(name for name in STUDIES if name in studies)]) if studies else settings.extras,
        **{name: tuple(sorted({*getattr(settings, name), *getattr(other, name)})) for name in SWEEPS},
    )


def without_requests(settings: Settings) -> Settings:
    """``settings`` without any requests."""
    extras = "all" if settings.has_extras else "none"
    return replace(settings, extras=extras, replicates=0, formats="", **dict.fromkeys(SWEEPS, ()))


def merged_formats(one: str, other: str) -> str:
    """Merge two definitions of formats, as ``resolved_formats`` (stages/prompt_formats.py) writes them; where they
    differ, ``other`` counts."""
    defined: dict[str, dict[str, Any]] = json.loads(one or "{}")
    for q_id, its in json.loads(other or "{}").items():
        defined[q_id] = {**defined.get(q_id, {}), **its}
    return json.dumps(defined, sort_keys=True, ensure_ascii=False) if defined else ""
