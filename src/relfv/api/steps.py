"""Single steps of the method on your own prompts: the effect of every head, and of a vector after every layer.

What is patched, by what, and what is scored is all given; only the engine (engine/base.py) is relfv's: one pass for
all heads, exact, compared with plain hooks when the model is opened.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from relfv.api.running import settings_from
from relfv.errors import InputError
from relfv.models.given import GivenModel, borrowed
from relfv.settings import MODEL_SETTINGS
from relfv.types import MEASURES, Effects, HeadId, Prompts

if TYPE_CHECKING:
    from relfv.language_model import LanguageModel

Prompt = str | Sequence[int]
"""A text, fed without a trailing space and with the tokenizer's own BOS; or token ids, fed as they are."""
Target = str | int
"""An answer, of which the first token after the prompt is scored; or the id of the scored token."""


@dataclass(frozen=True)
class StepEffects:
    """Scores of the targets without an edit and with each. Axes: ``prompt``, ``target`` where each prompt has several,
    and those of the edits: (layer, head) for heads, (layer,) or (layer, vector) for vectors."""

    targets: np.ndarray
    """int64 (prompt,) or (prompt, target): the token ids that are scored."""
    base: dict[str, np.ndarray]
    """``p``, ``logit`` and ``logprob`` -> float64, the shape of ``targets``."""
    edited: dict[str, np.ndarray]
    """The same with an edit: that shape, then the edits' axes. NaN for heads that were not asked for."""

    def delta(self, measure: str = "p") -> np.ndarray:
        """With each edit minus without, in ``p``, ``logit`` or ``logprob``."""
        base, edited = self.base[measure], self.edited[measure]
        return edited - base.reshape(*base.shape, *[1] * (edited.ndim - base.ndim))


def open_model(model: Any, tokenizer: Any = None, **options: Any) -> LanguageModel:
    """A model for ``head_effects`` and ``inject``: ``demo``, a folder, a hub id, or a transformers model with its
    ``tokenizer``. ``options`` of ``relfv run``: ``precision``, ``device``, ``dtype``, ``quant``, ``model_spec``,
    ``trust_remote_code``, ``self_check``.

    Raises InputError for a model, device or dtype that does not fit, RunError if relfv would misread its logits.
    """
    from relfv.runs.qid import open_for

    given = None if isinstance(model, str) or hasattr(model, "__fspath__") else GivenModel(model, tokenizer)
    known = {*MODEL_SETTINGS, "device", "trust_remote_code", "self_check"}
    settings = settings_from(options, known, model=given.name if given else str(model))
    if given is None:
        return open_for(settings)
    with borrowed(model):
        return open_for(given.resolved(settings), given)


def mean_activations(model: LanguageModel, prompts: Sequence[Prompt]) -> np.ndarray:
    """float32 (layer, head, head_dim): the mean over prompts of each head's slice of the input of the attention output
    projection, at the last token (Todd et al. 2024, eq. 2)."""
    from relfv.engine.clean import run_clean

    ids = [_ids(model, prompt) for prompt in prompts]
    with borrowed(model.backbone.model):
        clean = run_clean(model.backbone, Prompts(ids, [0] * len(ids)))
    return clean.activations.double().mean(0).float().numpy()


def head_effects(
    model: LanguageModel,
    prompts: Sequence[Prompt],
    targets: Sequence[Target] | Sequence[Sequence[Target]],
    replacement: Any,
    heads: Sequence[tuple[int, int]] | None = None,
) -> StepEffects:
    """Causal indirect effect of every head on every prompt (Todd et al. 2024, eq. 3): what the target's score is when
    the head's z at the last token is set to ``replacement``, one head at a time.

    ``targets``: one for each prompt, or several (each costs as much as the first). ``replacement``: (layer, head,
    head_dim), the same for all prompts, or (prompt, layer, head, head_dim); ``mean_activations`` gives the former.
    ``heads``: (layer, head) pairs, by default all. -> edits' axes (layer, head).

    Raises InputError for shapes that do not fit the model or each other.
    """
    arch = model.arch
    shape = (arch.n_layers, arch.n_heads, arch.head_dim)
    values = np.asarray(replacement, dtype=np.float32)
    if values.shape not in (shape, (len(prompts), *shape)):
        raise InputError(
            f"replacement has shape {values.shape}; expected (layer, head, head_dim) {shape}, or one for each of "
            f"{len(prompts)} prompts"
        )
    chosen = sorted(HeadId(*pair) for pair in heads) if heads is not None else _all_heads(model)
    if wrong := set(chosen) - set(_all_heads(model)):
        raise InputError(f"heads: {tuple(vars(min(wrong)).values())} is no head of {model.name}")

    def sweep(rows: Prompts, of_prompts: slice) -> Effects:
        own = values if values.ndim == 3 else values[of_prompts][0]
        return model.engine.sweep_heads(rows, own, chosen)

    flat = _effects(model, prompts, targets, sweep, one_by_one=values.ndim == 4)
    at = [head.layer for head in chosen], [head.head for head in chosen]
    edited = {}
    for measure, scores in flat.edited.items():
        edited[measure] = np.full((*scores.shape[:-1], *shape[:2]), np.nan)
        edited[measure][..., at[0], at[1]] = scores
    return StepEffects(flat.targets, flat.base, edited)


def inject(
    model: LanguageModel,
    prompts: Sequence[Prompt],
    targets: Sequence[Target] | Sequence[Sequence[Target]],
    vectors: Any,
    layers: Sequence[int] | None = None,
) -> StepEffects:
    """What the target's score is when a vector is added after a block at the last token, for every layer.

    ``vectors``: (resid_dim,) or (vector, resid_dim), already times alpha. ``layers``: by default all; they ascend in
    the result. -> edits' axes (layer,), or (layer, vector).

    Raises InputError for shapes that do not fit the model or each other.
    """
    values, n_layers = np.asarray(vectors, dtype=np.float32), model.arch.n_layers
    if values.ndim not in (1, 2) or values.shape[-1] != model.arch.resid_dim:
        raise InputError(
            f"vectors have shape {values.shape}; expected (resid_dim,) or (vector, resid_dim), and the residual stream "
            f"of {model.name} has {model.arch.resid_dim} dimensions"
        )
    chosen = sorted(set(layers)) if layers is not None else list(range(n_layers))
    if not chosen or not 0 <= chosen[0] <= chosen[-1] < n_layers:
        raise InputError(f"layers {chosen}: {model.name} has layers 0 to {n_layers - 1}")
    rows = np.atleast_2d(values)
    flat = _effects(model, prompts, targets, lambda some, _: model.engine.inject(some, rows, chosen))
    axes = (len(chosen), len(rows))[: values.ndim]
    edited = {measure: scores.reshape(*scores.shape[:-1], *axes) for measure, scores in flat.edited.items()}
    return StepEffects(flat.targets, flat.base, edited)


def _all_heads(model: LanguageModel) -> list[HeadId]:
    return [HeadId(layer, head) for layer in model.arch.out_projs for head in range(model.arch.n_heads)]


def _effects(
    model: LanguageModel,
    prompts: Sequence[Prompt],
    targets: Sequence[Target] | Sequence[Sequence[Target]],
    measure: Callable[[Prompts, slice], Effects],
    *,
    one_by_one: bool = False,
) -> StepEffects:
    """``measure`` of every prompt and target: edits on one axis, the last."""
    if not len(prompts) or len(prompts) != len(targets):
        raise InputError(f"{len(prompts)} prompts and {len(targets)} targets; expected as many, and at least one")
    several = [[its] if isinstance(its, str | int | np.integer) else list(its) for its in targets]
    n = len(several[0])
    if not n or any(len(its) != n for its in several):
        raise InputError("targets: expected as many for every prompt")
    fed = [_fed(model, prompt, target) for prompt, its in zip(prompts, several, strict=True) for target in its]
    model.context.require_room(max(len(ids) for ids, _ in fed) + 1)
    size = 1 if one_by_one else len(prompts)
    found = []
    with borrowed(model.backbone.model):
        for start in range(0, len(prompts), size):
            rows = fed[start * n : (start + size) * n]
            found.append(measure(Prompts([ids for ids, _ in rows], [t for _, t in rows]), slice(start, start + size)))
    shape = (len(prompts),) if isinstance(targets[0], str | int | np.integer) else (len(prompts), n)
    return StepEffects(
        np.array([target for _, target in fed]).reshape(shape),
        {m: np.concatenate([one.base.measure(m) for one in found]).reshape(shape) for m in MEASURES},
        {m: np.concatenate([one.edited.measure(m) for one in found]).reshape(*shape, -1) for m in MEASURES},
    )


def _ids(model: LanguageModel, prompt: Prompt) -> list[int]:
    ids = model.tokens.encode(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
    if not ids:
        raise InputError("a prompt gives no token; expected at least one")
    return ids


def _fed(model: LanguageModel, prompt: Prompt, target: Target) -> tuple[list[int], int]:
    """-> (what the model reads, the token that is scored). Where an answer begins with tokens of white space alone,
    they are fed."""
    ids = _ids(model, prompt)
    if not isinstance(target, str):
        return ids, int(target)
    if not isinstance(prompt, str):
        raise InputError(f"target {target!r}: its first token depends on the prompt's text; expected a token id here")
    answer = model.tokens.target(prompt, target)
    return [*ids, *answer.space_ids], answer.token_id
