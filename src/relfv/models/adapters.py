"""Adapters (PEFT): a folder that holds changes to a base model's weights instead of weights.

They are merged into the base model on opening, so that the heads which are measured are those of the adapted model
and everything else sees an ordinary model. Needs the optional package ``peft``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from relfv.errors import InputError

_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Adapter:
    """What a folder's adapter_config.json says."""

    folder: Path
    kind: str
    """``peft_type``, e.g. ``LORA``."""
    base: str
    """The base model, a folder or a hub id, as the adapter names it."""
    revision: str | None
    """The hub revision of the base model that the adapter asks for."""

    @property
    def has_tokenizer(self) -> bool:
        """Whether the adapter brings a tokenizer of its own; else the base model's is meant."""
        return (self.folder / "tokenizer_config.json").is_file()

    @property
    def note(self) -> str:
        """One line for artifacts."""
        return f"the {self.kind} adapter {self.folder.name!r} was merged into {self.base!r}"


def adapter_in(source: str) -> Adapter | None:
    """The adapter in the folder ``source``; None for a folder with a whole model, and for a hub id.

    Raises InputError if its config cannot be read or names no base model.
    """
    folder = Path(source)
    path = folder / _CONFIG
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind, base, revision = config["peft_type"], config["base_model_name_or_path"], config.get("revision")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise InputError(f"{path}: not the config of an adapter ({type(problem).__name__}: {problem})") from problem
    if not base:
        raise InputError(f"{path}: names no base model; write the base model's folder into base_model_name_or_path")
    beside = folder / str(base)
    return Adapter(folder, str(kind), str(beside if not Path(base).exists() and beside.is_dir() else base), revision)


def require_peft(adapter: Adapter) -> None:
    """Raises InputError with the install command where ``peft`` is absent."""
    try:
        import peft  # type: ignore[import-not-found]  # noqa: F401
    except ImportError:
        raise InputError(
            f"--model {str(adapter.folder)!r}: is an adapter for {adapter.base!r}, and peft, which merges it, is not "
            "installed; run: pip install 'relfv[peft]', or name a folder with the merged model"
        ) from None


def merged(model: Any, adapter: Adapter, place: torch.device) -> Any:
    """The base model with the adapter in its weights.

    Raises InputError for an adapter that does not fit the model or is not a change of weights (prompt tuning).
    """
    from peft import PeftModel  # type: ignore[import-not-found]

    folder = str(adapter.folder)
    try:
        adapted = PeftModel.from_pretrained(model, folder, torch_device=str(place))
        # from_pretrained leaves out in silence what has no place in the base model; loading again says what that was.
        loaded = adapted.load_adapter(folder, "default", torch_device=str(place))
        if odd := [*loaded.missing_keys, *loaded.unexpected_keys]:
            raise ValueError(f"{len(odd)} of its tensors, such as {odd[0]}, are in one of the two only")
        return adapted.merge_and_unload()  # type: ignore[operator]
    except Exception as problem:  # many kinds: damaged, another base, an adapter that has nothing to merge
        first_line = str(problem).strip().split("\n")[0] or type(problem).__name__
        raise InputError(
            f"--model {folder!r}: its {adapter.kind} adapter cannot be merged into {adapter.base!r}: "
            f"{first_line}; expected an adapter of weights, such as LoRA, made for this base model"
        ) from problem
