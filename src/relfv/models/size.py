"""Checks of a model's size before it is built: whether its config fits its weights, and whether it fits the memory.

transformers builds every layer that a config asks for before it looks at the weights: a slip in ``num_hidden_layers``
would cost minutes in silence, and weights larger than memory end a process without a word.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from relfv.errors import InputError
from relfv.models.memory import available_bytes

log = logging.getLogger(__name__)

_DEEP = 1000
"""Number of layers above which building is worth a word: transformers makes some hundreds a second, and no known model
is so deep."""


def check_size(name: str, source: str, config: Any, place: torch.device, dtype: torch.dtype | None) -> None:
    """Check the size of the model in ``source`` before it is built on ``place`` from ``config``, the text model's;
    ``dtype`` None is the stored one.

    Raises InputError if the config asks for more layers than a folder's weights have; warns of a model that is
    unusually deep, or larger than the memory that is free.
    """
    depth = getattr(config, "num_hidden_layers", None)
    depth = depth if isinstance(depth, int) else 0
    stored = stored_depth(Path(source))
    if stored is not None and depth > stored:
        raise InputError(
            f"--model {name!r}: its config.json says num_hidden_layers {depth}, and its weights have layers 0 to "
            f"{stored - 1} at most; expected a config that was made for these weights, so fetch or copy the model again"
        )
    if depth > _DEEP:
        log.warning("%s: its config asks for %d layers; building them takes minutes", name, depth)
    needed, free = _bytes_of_weights(Path(source), config, dtype), available_bytes()
    if place.type == "cpu" and free and needed > free:
        log.warning(
            "%s: its weights take %.0f GB and %.0f GB of memory are free; use --dtype bf16 or a larger machine",
            name,
            needed / 1e9,
            free / 1e9,
        )


def stored_depth(folder: Path) -> int | None:
    """``depth_of`` the names of the folder's tensors; None where they are not to be had quickly."""
    return depth_of(stored_names(folder))


def stored_names(folder: Path) -> list[str]:
    """The names of the folder's tensors; none where they are not to be had quickly."""
    names: list[str] = []
    try:
        if indexes := sorted(folder.glob("*.index.json")):
            names = [*json.loads(indexes[0].read_text(encoding="utf-8"))["weight_map"]]
        elif files := sorted(folder.glob("*.safetensors")):
            from safetensors import safe_open

            for file in files:
                with safe_open(file, framework="pt") as tensors:
                    names += tensors.keys()
    except Exception:  # damaged in one of many ways, which loading will explain
        return []
    return names


def depth_of(names: Iterable[str]) -> int | None:
    """Number of layers, from names of tensors: one more than the largest number of a layer, be it of the text model or
    of another part; None where no name has a number."""
    numbers = [int(found[1]) for name in names if (found := re.search(r"\.(\d+)\.", f".{name}"))]
    return 1 + max(numbers) if numbers else None


def _bytes_of_weights(folder: Path, config: Any, dtype: torch.dtype | None) -> float:
    """Memory for the weights in ``dtype``; 0 for a model on the hub."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    on_disk = sum(file.stat().st_size for file in files)
    stored = getattr(config, "dtype", None)
    if dtype is None or not isinstance(stored, torch.dtype):
        return on_disk
    return on_disk * dtype.itemsize / stored.itemsize
