"""Family and dtype of a checkpoint, from its config.json and the headers of its weights, without transformers (but for
GGUF files): so that two runs of the same model are the same experiment, whether they name its family and dtype or say
``auto``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from relfv.errors import first_line
from relfv.models.families import family_name
from relfv.models.sources import DTYPE_NAMES, snapshot, unreadable, weights_source
from relfv.settings import Settings

_LARGEST_HEADER = 100 << 20
_SAFETENSORS_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def resolved(settings: Settings) -> Settings:
    """``settings`` with the family and the dtype that ``auto`` stands for in this checkpoint.

    A family that no spec describes stays ``auto``. Raises InputError for a model that cannot be had, and for a family
    that is another one than the checkpoint's.
    """
    source, revision = weights_source(settings.model, settings.revision)
    if Path(source).is_file():
        config = _of_gguf(Path(source), settings.model)
    else:
        config = _config(source, revision, settings.model)
    text = config.get("text_config")
    text = text if isinstance(text, dict) else {}
    family = family_name(settings.model_spec, str(text.get("model_type") or config.get("model_type")))
    dtype = settings.dtype if settings.dtype != "auto" else _dtype(source, config, text)
    return replace(settings, model_spec=family, dtype=dtype)


def _config(source: str, revision: str | None, name: str) -> dict[str, Any]:
    path = snapshot(source, revision) / "config.json"
    try:
        content = json.loads(path.read_bytes()) if path.is_file() else None
    except (OSError, ValueError, RecursionError) as problem:
        raise unreadable(name, "config", problem) from problem
    if not isinstance(content, dict):
        raise unreadable(name, "config", ValueError(f"{path} holds no JSON object"))
    return content


def _of_gguf(path: Path, name: str) -> dict[str, Any]:
    """Config of a GGUF file, as far as it is needed here; transformers alone knows what it would say."""
    from relfv.models.gguf import DTYPE
    from relfv.models.kinds import model_class

    config = model_class(str(path.parent), name, {"gguf_file": path.name, "trust_remote_code": False})[1]
    return {"model_type": config.model_type, "dtype": DTYPE}


def _dtype(source: str, config: Mapping[str, Any], text: Mapping[str, Any]) -> str:
    """The dtype the weights are loaded in: as the config says, else as the first weights are stored, else float32."""
    for said in (config, text):
        name = str(said.get("dtype") or said.get("torch_dtype") or "").removeprefix("torch.")
        if name in DTYPE_NAMES:
            return name
    files = sorted(Path(source).glob("*.safetensors")) if Path(source).is_dir() else []
    return next((name for path in files if (name := _first_dtype(path))), "float32")


def header_of(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """Header of a safetensors file: what it says of each tensor, by name, and where in the file the first of their
    bytes is.

    Raises OSError, ValueError, AttributeError or RecursionError for a file that is none."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size)) if size <= _LARGEST_HEADER else {}
    return {name: tensor for name, tensor in header.items() if name != "__metadata__"}, 8 + size


def damaged_file(folder: Path) -> str:
    """Name of the first safetensors file in a folder that cannot be opened, and why; empty if there is none."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="np"):
                pass
        except Exception as problem:  # of the operating system's or safetensors' own kinds
            return f"{path.name}: {first_line(problem)}"
    return ""


def _first_dtype(path: Path) -> str | None:
    """dtype of a safetensors file's first tensor in one of the dtypes that relfv knows; None if there is none."""
    try:
        stored = [tensor.get("dtype") for tensor in header_of(path)[0].values()]
    except (OSError, ValueError, AttributeError, RecursionError):  # a damaged file is named when it is opened
        return None
    return next((_SAFETENSORS_NAMES[name] for name in stored if name in _SAFETENSORS_NAMES), None)
