"""Adapters (PEFT): a folder that holds changes to a base model's weights instead of whole weights.

An adapter is merged into its base model on opening, so that all other code sees an ordinary model, whose heads are
those of the adapted model. Merging needs the optional package ``peft``; reading what a folder is needs not even torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relfv.errors import InputError, first_line

if TYPE_CHECKING:
    import torch

_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Adapter:
    """Content of a folder's adapter_config.json."""

    folder: Path
    kind: str
    """``peft_type``, e.g. ``LORA``."""
    base: str
    """The base model, a folder or a hub id, as the adapter names it."""
    revision: str | None
    """The hub revision of the base model that the adapter asks for."""

    @property
    def has_tokenizer(self) -> bool:
        """Whether the folder holds a tokenizer; without one, the base model's is used."""
        return (self.folder / "tokenizer_config.json").is_file()

    @property
    def note(self) -> str:
        """Note on the adapter for artifacts, in one line."""
        return f"the {self.kind} adapter {self.folder.name!r} was merged into {self.base!r}"


def adapter_in(source: str) -> Adapter | None:
    """The adapter in the folder ``source``; None for a folder with a whole model or a hub id.

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
    if not base or not isinstance(base, str):
        raise InputError(f"{path}: names no base model; write the base model's folder into base_model_name_or_path")
    beside = folder / str(base)  # a relative path counts from the working directory first, then from the adapter
    return Adapter(folder, str(kind), str(beside if not Path(base).exists() and beside.is_dir() else base), revision)


def require_peft(adapter: Adapter) -> None:
    """Raise InputError, with the install command, where ``peft`` is not installed."""
    try:
        import peft  # type: ignore[import-not-found]  # noqa: F401
    except ImportError:
        raise InputError(
            f"--model {str(adapter.folder)!r}: is an adapter for {adapter.base!r}, and peft, which merges it, is not "
            "installed; run: pip install 'relfv[peft]', or name a folder with the merged model"
        ) from None


def merged(model: Any, adapter: Adapter, place: torch.device) -> Any:
    """``model``, the base model on ``place``, with the adapter merged into its weights.

    Raises InputError for an adapter that does not fit the model, or that does not change weights (prompt tuning).
    """
    from peft import PeftModel  # type: ignore[import-not-found]

    folder = str(adapter.folder)
    try:
        adapted = PeftModel.from_pretrained(model, folder, torch_device=str(place))
        # from_pretrained silently ignores tensors that have no place in the base model; load_adapter reports them.
        loaded = adapted.load_adapter(folder, "default", torch_device=str(place))
        if odd := [*loaded.missing_keys, *loaded.unexpected_keys]:
            raise ValueError(
                f"{len(odd)} tensor(s) in the adapter but not in the model or the reverse, such as {odd[0]}"
            )
        return adapted.merge_and_unload()  # type: ignore[operator]
    except Exception as problem:  # of many kinds: damaged, for another base, nothing to merge
        raise InputError(
            f"--model {folder!r}: its {adapter.kind} adapter cannot be merged into {adapter.base!r}: "
            f"{first_line(problem)}; expected an adapter of weights, such as LoRA, made for this base model"
        ) from problem
