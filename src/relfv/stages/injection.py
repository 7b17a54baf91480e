"""Adding the function vector to the residual stream at the last token (Todd et al. 2024, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from relfv.errors import InputError, RunError
from relfv.language_model import LanguageModel
from relfv.types import MEASURES, Effects, Prompts


class InjectionSweep:
    """Hidden state after block l, last token, += alpha * FV, for any layer l, on one set of prompts.

    All layers cost little more than one (they share the prefix and the batch), so the first layer asked for computes
    all, and a single layer gives the same bits alone as in a loop over all of them.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompts: Sequence[str],
        target_ids: Sequence[int],
        fv: torch.Tensor,
        alpha: float,
    ) -> None:
        if tuple(fv.shape) != (model.arch.resid_dim,):
            raise InputError(
                f"a function vector of shape {tuple(fv.shape)} does not fit {model.name}, whose residual stream has "
                f"{model.arch.resid_dim} dimensions"
            )
        self._model, self._targets = model, list(target_ids)
        self._ids = [model.tokens.encode(prompt) for prompt in prompts]
        self._vector = alpha * fv.float()
        # float32 swallows a vector a millionth of the residual stream's size, and rightly so.
        self._noticeable = abs(alpha) >= 0.01 and bool(fv.any())
        self._all: Effects | None = None

    def at_layer(self, edit_layer: int, per_pass: int | None = None) -> Effects:
        """Effects with fields (prompt,) without and (prompt, 1) with the vector at ``edit_layer``.

        ``per_pass`` prompts share a forward pass where this call is the one that computes. Raises InputError for a layer the model does not have, RunError if a vector that is not small changed nothing.
        """
        require_layer(self._model, edit_layer)
        if self._all is None:
            layers = list(range(self._model.arch.n_layers))
            vectors = self._vector[None]
            self._all = self._model.engine.inject(Prompts(self._ids, self._targets), vectors, layers, per_pass=per_pass)
        effects = replace(self._all, edited=self._all.edited[:, edit_layer : edit_layer + 1])
        if not torch.isfinite(effects.edited.logit).all():
            raise RunError(
                f"adding the vector at layer {edit_layer} gives NaN or infinite logits; expected finite numbers, so use a "
                "smaller --alpha (fp16 overflows in some models: --dtype bf16, or --precision exact)"
            )
        if self._noticeable and torch.equal(effects.edited.logit[:, 0], effects.base.logit):
            raise RunError(
                f"injecting at layer {edit_layer} changed no logit of any prompt although the vector is not small: "
                "the edit did not reach the model"
            )
        return effects


def require_layer(model: LanguageModel, edit_layer: int) -> None:
    """Raise InputError for a layer that the model does not have."""
    n_layers = model.arch.n_layers
    if not 0 <= edit_layer < n_layers:
        raise InputError(f"--edit_layer {edit_layer}: {model.name} has layers 0 to {n_layers - 1}")


def prompts_to_evaluate(trials: Sequence[dict[str, Any]], n_eval: int, *, allow_duplicates: bool) -> list[int]:
    """Indices of the trials to evaluate: the first ``n_eval`` in trial order, each distinct query once.

    A query drawn in five trials gives one and the same zero-shot prompt five times; counting it five times would
    make the sample look larger than it is.
    """
    chosen: dict[tuple[str, str] | int, int] = {}
    for index, trial in enumerate(trials):
        query = trial["query"]
        chosen.setdefault(index if allow_duplicates else (query["input"], query["output"]), index)
    return list(chosen.values())[:n_eval]


def summarize(effects: Effects, target_ids: Sequence[int]) -> dict[str, float]:
    """Accuracy (most probable token is the target) and measures, without and with the vector, over prompts.

    ``effects.edited`` has one column. ``delta_*`` is with minus without; standard deviations are of the population.
    """
    wanted = torch.tensor(list(target_ids))
    correct_base = (effects.base.top_id == wanted).double()
    correct_with = (effects.edited.top_id[:, 0] == wanted).double()
    numbers = {
        "acc_base": float(correct_base.mean()),
        "acc_with": float(correct_with.mean()),
        "delta_acc": float((correct_with - correct_base).mean()),
    }
    base, edited = effects.base.measures(), effects.edited[:, 0].measures()
    for m in MEASURES:
        delta = edited[m] - base[m]
        numbers[f"mean_{m}_base"] = float(base[m].mean())
        numbers[f"mean_{m}_with"] = float(edited[m].mean())
        numbers[f"mean_delta_{m}"] = float(delta.mean())
        numbers[f"std_delta_{m}"] = float(delta.std())
    return numbers
