"""Fingerprints of experiments: the settings, rows, model and algorithm version that two results must share, and how two
of them differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from relfv import ALGORITHM_VERSION
from relfv.settings import DEFAULTS, IDENTITY, Settings


def fingerprint_fields(settings: Settings, *, rows_sha256: str, model_identity: str) -> dict[str, Any]:
    """Values that two runs must share to continue each other, by name: settings, rows, model, algorithm version."""
    return {
        **{name: getattr(settings, name) for name in IDENTITY},
        "rows_sha256": rows_sha256,
        "model_identity": model_identity,
        "algorithm_version": ALGORITHM_VERSION,
    }


def fingerprint(values: Mapping[str, Any]) -> str:
    """sha256 of the fingerprint's fields."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def differences(
    there: Mapping[str, Any], here: Mapping[str, Any], q_id: str, *, models: tuple[str, str] = ("", "")
) -> list[str]:
    """List, in words, how two experiments' fingerprint fields differ; another model, one of ``models`` there and here,
    first. A setting that one side lacks, because an earlier version of relfv wrote it, has its default there."""
    in_words = {
        "rows_sha256": f"the rows of {q_id} in the CSV have changed",
        "model_identity": "the model's files or revision have changed"
        if models[0] == models[1]
        else f"model was {models[0]}, now {models[1]}",
    }
    names = sorted({**there, **here}, key=lambda name: name != "model_identity")  # the rest in alphabetical order
    values = {name: tuple(side.get(name, DEFAULTS.get(name)) for side in (there, here)) for name in names}
    return [in_words.get(name, f"{name} was {was}, now {now}") for name, (was, now) in values.items() if was != now]
