"""Models in one GGUF file, which transformers reads and unpacks: config and tokenizer, each kept once read.

Its reader goes through the whole vocabulary, which takes seconds, for each of them and each time it is asked.
"""

from __future__ import annotations

import copy
import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import Any

from relfv.errors import InputError
from relfv.models.formats import GGUF

DTYPE = "float32"
"""dtype that a GGUF file's weights are unpacked to unless another is asked for: it holds the numbers of every
format."""


def require_gguf(path: str | Path) -> None:
    """Raise InputError without the package ``gguf``."""
    if importlib.util.find_spec("gguf") is None:
        raise InputError(
            f"--model {str(path)!r}: reading a GGUF file needs gguf, which is not installed; run: "
            "pip install 'relfv[gguf]'"
        )


def read_config(source: str, *, gguf_file: str = "", **origin: Any) -> Any:
    """Read a config as ``AutoConfig.from_pretrained`` does; that of a GGUF file says that its weights are packed."""
    from transformers import AutoConfig

    if not gguf_file:
        return AutoConfig.from_pretrained(source, **origin)
    config = copy.deepcopy(_of_file(AutoConfig, source, gguf_file, (Path(source) / gguf_file).stat().st_mtime_ns))
    config.quantization_config = {"quant_method": GGUF}
    return config


def read_tokenizer(source: str, *, gguf_file: str = "", **origin: Any) -> Any:
    """Read a tokenizer as ``AutoTokenizer.from_pretrained`` does."""
    from transformers import AutoTokenizer

    if not gguf_file:
        return AutoTokenizer.from_pretrained(source, **origin)
    return copy.deepcopy(_of_file(AutoTokenizer, source, gguf_file, (Path(source) / gguf_file).stat().st_mtime_ns))


@lru_cache(maxsize=2)
def _of_file(kind: Any, folder: str, name: str, _changed: int) -> Any:
    require_gguf(Path(folder, name))
    return kind.from_pretrained(folder, gguf_file=name)
