"""Share a function vector: on the Hugging Face hub with a card, as a llama.cpp control vector, and as a steering
vector."""

from __future__ import annotations

import json
import tempfile
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from relfv.errors import InputError, RunError, first_line
from relfv.stages.vector_file import VECTOR_FILE
from relfv.store.files import write_atomic

if TYPE_CHECKING:
    from relfv.api.vector import FunctionVector

CARD = "README.md"
_ARCHITECTURE = "controlvector"


def card(fv: FunctionVector) -> str:
    """The text of the card of a hub repository that holds ``fv``: what it is, which model it is of, and how it is
    used."""
    about, heads = fv.metadata, ", ".join(f"{head.layer}.{head.head}" for head in fv.heads)
    return f"""---
library_name: relfv
tags:
- function-vector
- steering-vector
- mechanistic-interpretability
---

# Function vector {fv.q_id} of {fv.model}

The sum of the mean outputs of {len(fv.heads)} attention heads in the residual stream ({len(fv.vector)} dimensions),
chosen by their causal indirect effect ([Todd et al., ICLR 2024](https://arxiv.org/abs/2310.15213)) and made with relfv
{about["relfv_version"]}. It belongs to this one model: `{about["model_identity"]}`.

Added {fv.alpha:g} times after block {fv.layer} (counted from 0) at the last token of a prompt `Q: <word>\\nA:`.
**No space after the colon:** it belongs to the answer, and with it the vector does nothing useful.

```python
import relfv

fv = relfv.FunctionVector.from_hub("<this repository>")
with fv.apply(model):
    model.generate(**fv.prompt("<word>", tokenizer))
```

Heads (layer.head): {heads}.
"""


def write_folder(fv: FunctionVector, folder: Path) -> Path:
    """Write the files of a hub repository of ``fv``: the vector's file and the card. -> ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    fv.save(folder / VECTOR_FILE.name)
    write_atomic(folder / CARD, card(fv).encode())
    return folder


def push(fv: FunctionVector, repo_id: str, **options: Any) -> str:
    """Upload ``fv`` with its card; ``options`` of ``HfApi.create_repo``, such as ``private``. -> the commit's address.

    Raises RunError, with the hub's own words, where that cannot be done.
    """
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory(prefix="relfv-") as folder:
        write_folder(fv, Path(folder))
        try:
            api = HfApi()
            api.create_repo(repo_id, exist_ok=True, **options)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=f"relfv {fv.q_id}"))
        except Exception as problem:  # many kinds of error: no network, no access, an invalid name
            raise RunError(f"{repo_id}: cannot be written on the hub: {first_line(problem)}") from problem


def fetch(repo_id: str, revision: str | None = None) -> Path:
    """Download the vector's file of a hub repository into the local cache. Raises InputError where it cannot be had."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo_id, VECTOR_FILE.name, revision=revision))
    except Exception as problem:  # as in ``push``
        raise InputError(
            f"{repo_id!r}: no {VECTOR_FILE.name} to be had: {first_line(problem)}; expected a hub repository that "
            "push_to_hub has written, and a network or a cached copy"
        ) from problem


def write_gguf(fv: FunctionVector, path: Path) -> Path:
    """Write ``fv``, alpha times, as a control vector for llama.cpp (``--control-vector``), which adds it after the same
    block at *every* token, those of the prompt included; relfv adds it at the last one.

    Raises InputError without the package ``gguf``, and for layer 0, after which llama.cpp adds nothing.
    """
    try:
        import gguf  # type: ignore[import-not-found]
    except ImportError:
        raise InputError("needs the package gguf, which is not installed; run: pip install 'relfv[gguf]'") from None
    if fv.layer == 0:
        raise InputError(
            f"{fv.q_id}: its layer is 0, and llama.cpp has control vectors after blocks 1 and later alone; choose "
            "another layer: fv.at(layer=1).to_gguf(...)"
        )
    with tempfile.TemporaryDirectory(prefix="relfv-") as folder:
        made = Path(folder, path.name)
        with closing(gguf.GGUFWriter(str(made), _ARCHITECTURE)) as writer:
            writer.add_string(f"{_ARCHITECTURE}.model_hint", fv.metadata["model_type"])
            writer.add_uint32(f"{_ARCHITECTURE}.layer_count", 1)
            writer.add_string("relfv.metadata", json.dumps(dict(fv.metadata), ensure_ascii=False))
            writer.add_tensor(f"direction.{fv.layer}", np.float32(fv.alpha) * fv.vector)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        return write_atomic(path, made.read_bytes())


def as_steering_vector(fv: FunctionVector) -> Any:
    """Convert ``fv``, alpha times, to a ``steering_vectors.SteeringVector`` of the package of that name; its ``apply``
    adds it after the same block at every token from ``min_token_index`` on. Raises InputError without the package."""
    try:
        from steering_vectors import SteeringVector  # type: ignore[import-not-found]
    except ImportError:
        raise InputError(
            "needs the package steering-vectors, which is not installed; run: pip install steering-vectors"
        ) from None
    import torch

    return SteeringVector({fv.layer: torch.from_numpy(np.float32(fv.alpha) * fv.vector)}, "decoder_block")
