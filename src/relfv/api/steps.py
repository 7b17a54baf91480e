"""Single steps of the method on your own prompts: the effect of every head, and of a vector after every layer.

What is patched, by what, and what is scored is all given; only the engine (engine/base.py) is relfv's: one pass for
all heads, exact, compared with plain hooks when the model is opened.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from relfv.api.running import require_no_tokenizer, settings_from
from relfv.errors import InputError, UsageWarning
from relfv.logs import told
from relfv.models.given import GivenModel, borrowed, own_defaults
from relfv.settings import MODEL_SETTINGS
from relfv.types import MEASURES, Effects, HeadId, Prompts

if TYPE_CHECKING:
    from relfv.language_model import LanguageModel

Prompt = str | Sequence[int]
"""A prompt: a text, fed without a trailing space and with the tokenizer's own BOS; or token ids, fed as they are."""
Target = str | int
"""A target: an answer, of which the first token after the prompt is scored; or the id of the scored token."""


@dataclass(frozen=True)
class StepEffects:
    """Scores of the targets without an edit and with each edit. Axes: ``prompt``, ``target`` where each prompt has
    several, and those of the edits: (layer, head) for heads, (layer,) or (layer, vector) for vectors."""

    targets: np.ndarray
    """Token ids that are scored: int64 (prompt,) or (prompt, target)."""
    base: dict[str, np.ndarray]
    """Scores without an edit: ``p``, ``logit`` and ``logprob`` -> float64, the shape of ``targets``."""
    edited: dict[str, np.ndarray]
    """Scores with each edit, by the same three names: the shape of ``targets``, then the edits' axes. NaN for heads
    that were not asked for."""

    def delta(self, measure: str = "p") -> np.ndarray:
        """Change made by each edit (with minus without), in ``p``, ``logit`` or ``logprob``. Raises InputError for
        another measure."""
        if measure not in MEASURES:
            raise InputError(f"measure {measure!r}: expected one of {', '.join(MEASURES)}")
        base, edited = self.base[measure], self.edited[measure]
        return edited - base.reshape(*base.shape, *[1] * (edited.ndim - base.ndim))


def open_model(model: Any, tokenizer: Any = None, **options: Any) -> LanguageModel:
    """Open a model for ``head_effects`` and ``inject``: ``demo``, a folder, a hub id, or a transformers model with its
    ``tokenizer``. ``options`` are those of ``relfv run``: ``precision``, ``device``, ``dtype``, ``quant``,
    ``model_spec``, ``trust_remote_code``, ``self_check``.

    Raises InputError for a model, device or dtype that does not fit, RunError if relfv would misread its logits.
    """
    from relfv.runs.qid import open_for

    given = None if isinstance(model, str) or hasattr(model, "__fspath__") else GivenModel(model, tokenizer)
    require_no_tokenizer(given, tokenizer)
    known = {*MODEL_SETTINGS, "device", "trust_remote_code", "self_check"}
    settings = settings_from(options, known, model=given.name if given else str(model))
    if given is None:
        with told(), own_defaults():
            return open_for(settings)
    with told(), borrowed(given.model):
        return open_for(given.resolved(settings), given)


def mean_activations(
    model: LanguageModel, prompts: Sequence[Prompt], targets: Sequence[Target] | None = None
) -> np.ndarray:
    """Mean activation of each head: float32 (layer, head, head_dim), the mean over prompts of the head's slice of the
    input of the attention output projection, at the last token (Todd et al. 2024, eq. 2).

    ``targets``: each prompt's answer. Where one begins with tokens of white space alone (digits, in Llama-3's and
    sentencepiece tokenizers), these are fed and the last of them is the last token, as in ``head_effects``.

    Raises InputError for prompts and targets that do not fit the model or each other.
    """
    from relfv.engine.clean import run_clean

    _require_as_many(prompts, prompts if targets is None else targets)
    given = [0] * len(prompts) if targets is None else targets
    ids = [_fed(model, prompt, target)[0] for prompt, target in zip(prompts, given, strict=True)]
    model.context.require_room(max(map(len, ids)))
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
    """Measure the causal indirect effect of every head on every prompt (Todd et al. 2024, eq. 3): the target's score
    when the head's z at the last token is set to ``replacement``, one head at a time.

    ``targets``: one for each prompt, or several (each costs as much as the first). ``replacement``: (layer, head,
    head_dim), the same for all prompts, or (prompt, layer, head, head_dim); ``mean_activations`` gives the former.
    ``heads``: (layer, head) pairs, by default all. -> edits' axes (layer, head).

    Raises InputError for values that do not fit the model or each other. Warns (UsageWarning) where answers begin with
    tokens of white space alone: these are fed, so means are to be taken with the answers as well.
    """
    arch = model.arch
    shape = (arch.n_layers, arch.n_heads, arch.head_dim)
    values = _finite("replacement", replacement)
    if values.shape not in (shape, (len(prompts), *shape)):
        raise InputError(
            f"replacement has shape {values.shape}; expected (layer, head, head_dim) {shape}, or one for each of "
            f"{len(prompts)} prompts"
        )
    there: dict[tuple[int, ...], HeadId] = {(head.layer, head.head): head for head in _all_heads(model)}
    pairs = list(there) if heads is None else [tuple(np.ravel(pair).tolist()) for pair in heads]
    if wrong := [pair for pair in pairs if pair not in there]:
        raise InputError(f"heads: {wrong[0]} is no head of {model.name}; expected (layer, head) pairs")
    chosen = sorted({there[pair] for pair in pairs})

    def sweep(rows: Prompts, of_prompts: slice) -> Effects:
        own = values if values.ndim == 3 else values[of_prompts][0]
        return model.engine.sweep_heads(rows, own, chosen)

    flat = _effects(model, prompts, targets, sweep, one_by_one=values.ndim == 4, means=True)
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
    """Score the target when a vector is added after a block at the last token, for every layer.

    ``vectors``: (resid_dim,) or (vector, resid_dim), already times alpha. ``layers``: by default all; they ascend in
    the result. -> edits' axes (layer,), or (layer, vector).

    Raises InputError for values that do not fit the model or each other.
    """
    values, n_layers = _finite("vectors", vectors), model.arch.n_layers
    if values.ndim not in (1, 2) or values.shape[-1] != model.arch.resid_dim:
        raise InputError(
            f"vectors have shape {values.shape}; expected (resid_dim,) or (vector, resid_dim), and the residual stream "
            f"of {model.name} has {model.arch.resid_dim} dimensions"
        )
    asked = list(range(n_layers)) if layers is None else np.ravel(np.asarray(layers)).tolist()
    if not asked or not all(isinstance(layer, int) and 0 <= layer < n_layers for layer in asked):
        raise InputError(f"layers {layers}: {model.name} has layers 0 to {n_layers - 1}")
    chosen = sorted(set(asked))
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
    means: bool = False,
) -> StepEffects:
    """Apply ``measure`` to every prompt and target, with the edits on one axis, the last. ``means``: the edits are
    means over prompts."""
    _require_as_many(prompts, targets)
    alone = [isinstance(its, str) or not isinstance(its, Sequence | np.ndarray) for its in targets]
    several: list[Any] = [[its] if is_one else list(its) for its, is_one in zip(list[Any](targets), alone, strict=True)]
    n = len(several[0])
    if not n or any(len(its) != n for its in several) or len({*alone}) > 1:
        raise InputError("targets: expected as many for every prompt")
    each = [(prompt, target) for prompt, its in zip(prompts, several, strict=True) for target in its]
    fed = [_fed(model, *one) for one in each]
    model.context.require_room(max(len(ids) for ids, _ in fed) + 1)
    n_spaced = sum(len(ids) > len(_ids(model, prompt)) for (ids, _), (prompt, _) in zip(fed, each, strict=True))
    if means and n_spaced:
        said = f"{n_spaced} of {len(fed)} answers begin with white space alone, which is fed before the token that is"
        remedy = "means fit if they were taken with the answers, too, as mean_activations(model, prompts, targets) does"
        warnings.warn(f"{said} scored; {remedy}", UsageWarning, stacklevel=3)
    size = 1 if one_by_one else len(prompts)
    found = []
    with borrowed(model.backbone.model):
        for start in range(0, len(prompts), size):
            rows = fed[start * n : (start + size) * n]
            found.append(measure(Prompts([ids for ids, _ in rows], [t for _, t in rows]), slice(start, start + size)))
    shape = (len(prompts),) if alone[0] else (len(prompts), n)
    return StepEffects(
        np.array([target for _, target in fed]).reshape(shape),
        {m: np.concatenate([one.base.measure(m) for one in found]).reshape(shape) for m in MEASURES},
        {m: np.concatenate([one.edited.measure(m) for one in found]).reshape(*shape, -1) for m in MEASURES},
    )


def _require_as_many(prompts: Sequence[Prompt], targets: Sequence[Any]) -> None:
    for name, given in (("prompts", prompts), ("targets", targets)):
        if isinstance(given, str) or not hasattr(given, "__len__"):
            raise InputError(f"{name} are {str(given)[:40]!r}; expected a list of them")
    if not len(prompts) or len(prompts) != len(targets):
        raise InputError(f"{len(prompts)} prompts and {len(targets)} targets; expected as many, and at least one")


def _finite(name: str, given: Any) -> np.ndarray:
    try:
        values = np.asarray(given.detach().float().cpu() if hasattr(given, "detach") else given, dtype=np.float32)
    except (TypeError, ValueError) as problem:
        raise InputError(f"{name}: {problem}; expected an array of numbers") from None
    if not np.isfinite(values).all():
        raise InputError(f"{name} holds NaN or infinities; expected finite numbers")
    return values


def _ids(model: LanguageModel, prompt: Prompt) -> list[int]:
    ids = model.tokens.encode(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
    if not ids:
        raise InputError("a prompt gives no token; expected at least one")
    model.tokens.require_known(ids)
    return ids


def _fed(model: LanguageModel, prompt: Prompt, target: Target) -> tuple[list[int], int]:
    """-> (token ids that the model reads, id of the token that is scored). Where an answer begins with tokens of white
    space alone, they are fed."""
    ids = _ids(model, prompt)
    if isinstance(target, bool) or not isinstance(target, str | int | np.integer):
        raise InputError(f"target {target!r}: expected an answer or the id of a token")
    if not isinstance(target, str):
        model.tokens.require_known([int(target)])
        return ids, int(target)
    if not isinstance(prompt, str):
        raise InputError(f"target {target!r}: its first token depends on the prompt's text; expected a token id here")
    answer = model.tokens.target(prompt, target)
    return [*ids, *answer.space_ids], answer.token_id
