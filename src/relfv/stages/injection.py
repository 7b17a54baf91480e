"""Adding a vector to the residual stream at the last token, at every layer (Todd et al. 2024, section 3), and its
effect in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from relfv.errors import InputError, RunError
from relfv.types import MEASURES, Effects, Prompts

if TYPE_CHECKING:
    from relfv.language_model import LanguageModel

TOKEN_RULE = "last prompt token; the prompt is fed without a trailing space, with the tokenizer's own BOS"


@dataclass(frozen=True)
class Injections:
    """Effects of adding alpha * FV to the hidden state after block l at the last token, for every layer l, on one set
    of prompts.

    All layers cost little more than one (they share the prefix and the batch), so all are computed together, and a
    single layer gives the same bits alone as in a loop over all of them.
    """

    effects: Effects
    """Scores without and with the vector: ``base`` (prompt,), ``edited`` (prompt, layer)."""
    noticeable: bool
    """Whether the vector is large enough that some logit must change: float32 rightly swallows a vector a millionth of
    the residual stream's size."""

    @property
    def per_pass(self) -> int:
        """Prompts that shared a forward pass."""
        return self.effects.per_pass

    @cached_property
    def hidden(self) -> np.ndarray:
        """float64 (layer,): mean over prompts of the length of the untouched hidden state after each layer."""
        assert self.effects.lengths is not None
        return self.effects.lengths.double().mean(0).numpy()

    def at_layer(self, layer: int) -> Effects:
        """Effects with fields (prompt,) without and (prompt, 1) with the vector at ``layer``. Raises as
        ``require_sound``."""
        self.require_sound(layer)
        return replace(self.effects, edited=self.effects.edited[:, layer : layer + 1])

    def require_sound(self, layer: int) -> None:
        """Raise RunError for infinite or NaN logits at ``layer``, and if a vector that is not small changed nothing."""
        if not self._finite[layer]:
            raise RunError(
                f"adding the vector at layer {layer} gives NaN or infinite logits; expected finite numbers, so use a "
                "smaller --alpha (fp16 overflows in some models: --dtype bf16, or --precision exact)"
            )
        if self.noticeable and self._unmoved[layer]:
            raise RunError(
                f"injecting at layer {layer} changed no logit of any prompt although the vector is not small: "
                "the edit did not reach the model"
            )

    @cached_property
    def _finite(self) -> list[bool]:
        return self.effects.edited.logit.isfinite().all(0).tolist()

    @cached_property
    def _unmoved(self) -> list[bool]:
        return (self.effects.edited.logit == self.effects.base.logit[:, None]).all(0).tolist()


def inject_at_every_layer(
    model: LanguageModel, prompts: Prompts, fv: np.ndarray, alpha: float, *, per_pass: int | None = None
) -> Injections:
    """Add alpha * ``fv`` (resid_dim,) after every block. Raises InputError for a vector of another width than the
    model's residual stream."""
    if fv.shape != (model.arch.resid_dim,):
        raise InputError(
            f"a function vector of shape {fv.shape} does not fit {model.name}, whose residual stream has "
            f"{model.arch.resid_dim} dimensions"
        )
    vectors = (np.float32(alpha) * fv)[None]
    effects = model.engine.inject(prompts, vectors, range(model.arch.n_layers), per_pass=per_pass)
    return Injections(effects, noticeable=abs(alpha) >= 0.01 and bool(fv.any()))


def length(vector: np.ndarray) -> float:
    """Euclidean norm, summed in float64."""
    import torch

    return float(torch.from_numpy(vector).double().norm())


def require_layer(model: LanguageModel, edit_layer: int) -> None:
    """Raise InputError for a layer that the model does not have."""
    n_layers = model.arch.n_layers
    if not 0 <= edit_layer < n_layers:
        raise InputError(f"--edit_layer {edit_layer}: {model.name} has layers 0 to {n_layers - 1}")


def summaries(effects: Effects, right: Sequence[Sequence[int]]) -> list[dict[str, float]]:
    """Summary of each column of ``effects.edited``, such as a layer: accuracy (the most probable token is among those
    that are ``right``) and measures, without and with the vector, over prompts.

    ``delta_*`` is with minus without; standard deviations are of the population.
    """
    base, edited = effects.base, effects.edited
    correct_base, correct_with = base.correct(right), _by_column(edited.correct(right))
    columns = {
        "acc_base": correct_base.mean(),
        "acc_with": correct_with.mean(1),
        "delta_acc": (correct_with - correct_base).mean(1),
    }
    for m in MEASURES:
        without, with_it = base.measure(m), _by_column(edited.measure(m))
        with np.errstate(invalid="ignore"):  # a layer of infinite logits is refused in its turn
            delta = with_it - without
        columns |= {
            f"mean_{m}_base": without.mean(),
            f"mean_{m}_with": with_it.mean(1),
            f"mean_delta_{m}": delta.mean(1),
            f"std_delta_{m}": delta.std(1),
        }
    rows = zip(*(np.broadcast_to(values, len(correct_with)).tolist() for values in columns.values()), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in rows]


def _by_column(values: np.ndarray) -> np.ndarray:
    """Transpose (prompt, column) -> (column, prompt), laid out so that each column is summed as if it were alone."""
    return np.ascontiguousarray(values.T)
