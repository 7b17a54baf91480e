"""A function vector and all that is needed to use it, read from one file."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from relfv.api import sharing
from relfv.errors import InputError, UsageWarning
from relfv.stages.prompts import zero_shot_prompt
from relfv.stages.vector_file import PART, VECTOR, VECTOR_FILE, read_vector_file
from relfv.store.files import write_atomic
from relfv.store.safetensors import safetensors_bytes
from relfv.types import HeadId

if TYPE_CHECKING:
    from transformers import BatchEncoding


@dataclass(frozen=True)
class FunctionVector:
    """A function vector: the sum of the top heads' mean outputs in the residual stream (Todd et al. 2024, eq. 5), and
    how it is used.

    relfv adds ``alpha`` times ``vector`` after block ``layer`` at the last token of a prompt that ends in ``A:``,
    *without* a space after it: the space belongs to the answer. ``prompt`` gives such prompts.
    """

    vector: np.ndarray = field(repr=False)
    """The vector, float32 (resid_dim,)."""
    by_layer: Mapping[int, np.ndarray] = field(repr=False)
    """Part of the vector from each layer's heads: layer -> float32 (resid_dim,); the parts sum to ``vector``."""
    layer: int
    """The best layer to add it after, counted from 0: chosen by the score of zero-shot prompts with the vector."""
    alpha: float
    heads: tuple[HeadId, ...] = field(repr=False)
    """The heads whose outputs are summed, best first."""
    q_id: str
    model: str
    """The name of the model that it was made with."""
    metadata: Mapping[str, str] = field(repr=False)
    """All metadata of the file, lists and objects as JSON."""

    @staticmethod
    def read(path: str | Path) -> FunctionVector:
        """Read the vector in a ``function_vector.safetensors``. Raises InputError if there is no such file, RunError if
        the file is not a function vector."""
        arrays, metadata = read_vector_file(Path(path))
        return FunctionVector(
            vector=arrays[VECTOR],
            by_layer={int(n.removeprefix(PART)): part for n, part in arrays.items() if n.startswith(PART)},
            layer=int(metadata["layer"]),
            alpha=float(metadata["alpha"]),
            heads=tuple(HeadId(*head) for head in json.loads(metadata["heads"])),
            q_id=metadata["q_id"],
            model=metadata["model"],
            metadata=metadata,
        )

    def save(self, path: str | Path) -> Path:
        """Write the vector as one safetensors file, which ``read`` reads: into ``path`` if that is a folder, else at
        it."""
        place = Path(path)
        place = place / VECTOR_FILE.name if place.is_dir() else place
        parts = {f"{PART}{layer}": part for layer, part in sorted(self.by_layer.items())}
        metadata = {**self.metadata, "layer": str(self.layer), "alpha": repr(self.alpha)}
        return write_atomic(place, safetensors_bytes({VECTOR: self.vector, **parts}, metadata))

    def prompt(self, words: str | Sequence[str], tokenizer: Any) -> BatchEncoding:
        """Make model inputs for one word or several, exactly as relfv feeds them: ``Q: <word>\\nA:`` with the
        tokenizer's own BOS and no trailing space. ``input_ids`` and ``attention_mask`` (word, token), padded on the
        left, on the CPU; ``.to(model.device)`` moves them.

        Where answers begin with a token of white space alone (digits in some tokenizers) that token is there, too, as
        it was when the vector was made. Raises InputError for what is no word of a relation.
        """
        import torch
        from transformers import BatchEncoding

        from relfv.models.tokens import Tokens

        tokens, spaces = Tokens(tokenizer), json.loads(self.metadata["space_ids"])
        given = [words] if isinstance(words, str) else list(words)
        if not given:
            raise InputError("words: is empty; expected a word or several")
        for word in given:
            _require_word(word)
            tokens.require_plain(word)
        rows = [[*tokens.encode(zero_shot_prompt(word)), *spaces.get(word, spaces[""])] for word in given]
        width, padding = max(map(len, rows)), tokenizer.pad_token_id or 0
        return BatchEncoding(
            {
                "input_ids": torch.tensor([[padding] * (width - len(row)) + row for row in rows]),
                "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
            }
        )

    def apply(
        self,
        model: Any,
        *,
        layer: int | None = None,
        alpha: float | None = None,
        where: Literal["last", "generated"] = "last",
    ) -> AbstractContextManager[None]:
        """While open, add alpha times the vector after block ``layer`` of ``model``, a transformers model: at the last
        token of each prompt, or with ``where="generated"`` from there on at every token that is written.

        In any batch, padded on either side, with a cache or without, and under ``generate()``, whose batches must be
        padded on the left. The model is otherwise left as it is, and the hooks are gone afterwards whatever happens.

        Raises InputError for another width or a way of running that cannot be followed (a filled cache, an assistant
        model), RunError on leaving if nothing was added. Warns (UsageWarning) of another model than the vector's own,
        and of prompts that do not begin and end as relfv's do.
        """
        import torch

        from relfv.api.applying import Frame, adding
        from relfv.models.given import difference, require_model

        require_model(model)
        if other := difference(model, self.metadata["model_identity"]):
            said = f"the vector of {self.q_id} was made with {self.model}, and this is another model: {other}"
            warnings.warn(said, UsageWarning, stacklevel=2)
        ids = (json.loads(self.metadata[f"prompt_{end}_with_ids"]) for end in ("begins", "ends"))
        times = self.alpha if alpha is None else alpha
        if not np.isfinite(times):
            raise InputError(f"alpha={times}: expected a finite number")
        vector = torch.from_numpy(np.float32(times) * self.vector)
        return adding(model, self.layer if layer is None else layer, vector, where, Frame(*ids))

    @staticmethod
    def from_hub(repo_id: str, revision: str | None = None) -> FunctionVector:
        """Read the vector of a Hugging Face hub repository that ``push_to_hub`` wrote. Raises InputError if none can be
        had."""
        return FunctionVector.read(sharing.fetch(repo_id, revision))

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the vector's file and a card that says how it is used; ``options`` of ``HfApi.create_repo``, such as
        ``private=True``. -> the commit's address. Raises RunError where that cannot be done."""
        return sharing.push(self, repo_id, **options)

    def to_gguf(self, path: str | Path) -> Path:
        """Write alpha times the vector as a control vector for llama.cpp, which adds it at *every* token of prompt and
        answer. Needs ``relfv[gguf]``. Raises InputError for layer 0, after which llama.cpp cannot add anything."""
        return sharing.write_gguf(self, Path(path))

    def to_steering_vector(self) -> Any:
        """Convert alpha times the vector to a ``SteeringVector`` of the package steering-vectors."""
        return sharing.as_steering_vector(self)

    def at(self, *, layer: int | None = None, alpha: float | None = None) -> FunctionVector:
        """A copy of this vector with another layer or alpha."""
        return replace(self, layer=self.layer if layer is None else layer, alpha=self.alpha if alpha is None else alpha)


def _require_word(word: str) -> None:
    if not isinstance(word, str) or not word or "\n" in word:
        raise InputError(f"{str(word)[:80]!a}: expected one word or phrase; the prompt around it is made here")
    if word != word.strip():
        raise InputError(f"{word[:80]!a}: has spaces around it, which relfv's words never have; take them away")
