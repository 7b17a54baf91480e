"""The selected heads without the spec's vector: put in place themselves, and as the vector of what they really write
(engine/writing.py), for where the spec's vector is not what carries the relation. Made from the same ``Ground`` as the
controls and recorded with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from relfv.progress import doing
from relfv.stages.function_vector import BuiltVector, build_function_vector, parts_add_up
from relfv.stages.injection import length
from relfv.stages.judging import judge_vectors, mean_over_draws
from relfv.stages.step6 import injections
from relfv.stages.zeroshot import evaluated_prompts
from relfv.store.folder import File
from relfv.store.formats import finite, read_tensors, tensor_bytes
from relfv.types import Effects, HeadId, MeanActivations, Prompts

if TYPE_CHECKING:
    import torch

    from relfv.engine.base import Together
    from relfv.stages.control_vectors import Ground
    from relfv.stages.stage import Work

_N_DRAWS_BY_LAYER = 5
"""Number of draws of random heads whose parts are added layer by layer: their mean is shown, and no claim is tested
against the best of them."""

# --- made from clean activations -------------------------------------------------------------------------------------


def means(activations: torch.Tensor, shares: np.ndarray) -> torch.Tensor:
    """float32 (set, ...): means of ``activations`` (trial, ...) by each set's ``shares`` (set, trial) of the trials."""
    import torch

    z = activations.double()
    return (torch.from_numpy(shares) @ z.flatten(1)).view(len(shares), *z.shape[1:]).float()


def parts_of_sets(
    ground: Ground, shares: np.ndarray, chosen: Sequence[Sequence[HeadId]], *, written: bool
) -> torch.Tensor:
    """Each set's heads, and its ``shares`` (set, trial) of the mean over the clean activations -> float64
    (layer, set, resid_dim): sums of projected means, as defined or as ``written``. Each head's columns of the output
    projection are read once, and a layer's together."""
    import torch

    arch, writing, queued = ground.arch, ground.clean.writing if written else None, {}
    sets = [frozenset(heads_of_set) for heads_of_set in chosen]
    used = sorted(frozenset().union(*sets))
    for layer, of_layer in groupby(used, key=lambda head: head.layer):
        heads = list(of_layer)
        z = ground.clean.of_heads(heads, written=written)
        mean = (torch.from_numpy(shares) @ z.flatten(1)).view(len(chosen), *z.shape[1:])
        is_chosen = torch.tensor([[head in heads_of_set for head in heads] for heads_of_set in sets])
        queued[layer] = arch.project_heads(layer, [head.head for head in heads], mean * is_chosen[..., None])
    parts = torch.zeros(arch.n_layers, len(chosen), arch.resid_dim, dtype=torch.float64)
    for layer, part in queued.items():
        parts[layer] = writing.gained(layer, part.cpu()) if writing else part
    return parts


def vector_as_written(ground: Ground) -> BuiltVector:
    """The function vector of what the selected heads write, from the same float32 means as the spec's vector; the same
    digits where nothing stands between the heads and the residual stream."""
    means = ground.clean.of_heads(ground.selected, written=True).mean(0).float()
    written = MeanActivations(_laid(ground, ground.selected, means[None])[0].numpy(), len(ground.trial_queries))
    return build_function_vector(ground.arch, written, ground.selected, ground.clean.writing)


def _laid(ground: Ground, heads: Sequence[HeadId], values: torch.Tensor) -> torch.Tensor:
    """(set, head, head_dim) of these heads -> (set, layer, head, head_dim), 0 for others."""
    laid = values.new_zeros(len(values), *ground.clean.activations.shape[1:])
    laid[:, [head.layer for head in heads], [head.head for head in heads]] = values
    return laid


# --- vectors, added after one layer like all controls -----------------------------------------------------------------


def differs(ground: Ground) -> bool:
    """Whether what heads write is known and differs from W_O z; if not, the spec's vector stands for the one as
    written."""
    return ground.clean.writing is not None and not ground.clean.writing.is_plain


def as_written(ground: Ground) -> torch.Tensor | None:
    import torch

    return torch.from_numpy(vector_as_written(ground).total).double()[None, None, None] if differs(ground) else None


def as_written_held_out(ground: Ground) -> torch.Tensor | None:
    if not differs(ground) or ground.held_out is None:
        return None
    shares, chosen, prompt = ground.held_out
    return ground.vectors(shares, chosen, written=True)[prompt][None, :, None]


def random_heads_as_written(ground: Ground) -> torch.Tensor | None:
    if not differs(ground) or not ground.draws:
        return None
    return ground.vectors(ground.all_trials(len(ground.draws)), ground.draws, written=True)[None, None]


# --- several edits in one pass ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AtOnce:
    """One kind of edit of several heads or layers, in one pass."""

    meaning: str
    versions: Callable[[Ground, float], list[Together]]
    """Function of ground and alpha that makes the versions: none where there is none, several where they are draws."""
    brief: bool = False
    """Whether a number is of little weight, as ``brief`` of a ``Control``."""


def _in_place(ground: Ground, _: float) -> list[Together]:
    return _put(ground, [[ground.selected]], ground.all_trials(1))


def _in_place_held_out(ground: Ground, _: float) -> list[Together]:
    if ground.held_out is None:
        return []
    shares, chosen, prompt = ground.held_out
    return _put(ground, [[chosen[i] for i in prompt]], shares, prompt)


def _random_in_place(ground: Ground, _: float) -> list[Together]:
    return _put(ground, [[draw] for draw in ground.draws], ground.all_trials(1))


def _by_layer(ground: Ground, alpha: float) -> list[Together]:
    return _added(_parts(ground, alpha, ground.all_trials(1), [ground.selected]))


def _by_layer_held_out(ground: Ground, alpha: float) -> list[Together]:
    if ground.held_out is None:
        return []
    shares, chosen, prompt = ground.held_out
    parts = _parts(ground, alpha, shares, chosen)
    return _added(parts[None, prompt] if len(parts) else [])


def _random_by_layer(ground: Ground, alpha: float) -> list[Together]:
    draws = ground.draws[:_N_DRAWS_BY_LAYER]
    return _added(_parts(ground, alpha, ground.all_trials(len(draws)), draws))


def _put(
    ground: Ground, sets: Sequence[Sequence[Sequence[HeadId]]], shares: np.ndarray, prompt: Any = slice(None)
) -> list[Together]:
    """A version for each of ``sets``, which has a set of heads for each prompt, or one for all; their values are means
    by ``shares`` (set, trial), of which each ``prompt`` takes a set."""
    from relfv.engine.base import Together

    heads = sorted({head for of_prompts in sets for heads in of_prompts for head in heads})
    values = _laid(ground, heads, means(ground.clean.of_heads(heads), shares))[prompt]
    return [Together.setting(of_prompts, values) for of_prompts in sets]


def _parts(ground: Ground, alpha: float, shares: np.ndarray, chosen: Sequence[Sequence[HeadId]]) -> torch.Tensor:
    """float32 (set, layer, resid_dim): alpha times what each set writes; no sets where that is not known."""
    if ground.clean.writing is None:
        shares, chosen = shares[:0], []
    return (
        (alpha * parts_of_sets(ground, shares, chosen, written=ground.clean.writing is not None)).float().swapaxes(0, 1)
    )


def _added(versions: Iterable[torch.Tensor]) -> list[Together]:
    """A version for each (prompt, layer, resid_dim), or (layer, resid_dim) for all prompts."""
    from relfv.engine.base import Together

    return [Together(added=parts if parts.dim() == 3 else parts[None]) for parts in versions]


_LEFT_OUT = "; for each prompt means and ranking without its own query's trials, like held_out"
AT_ONCE = {
    "heads_in_place": AtOnce(
        "z of every selected head := its clean mean at the last token, all in one pass, no vector added: what the "
        "heads can do whatever the vector's size",
        _in_place,
    ),
    "heads_in_place_held_out": AtOnce("the same" + _LEFT_OUT, _in_place_held_out),
    "random_heads_in_place": AtOnce(
        "the same with heads drawn like random_heads; mean over draws", _random_in_place, brief=True
    ),
    "as_written_by_layer": AtOnce(
        "alpha times what each layer's selected heads really write, added after their own layer, all in one pass",
        _by_layer,
    ),
    "as_written_by_layer_held_out": AtOnce("the same" + _LEFT_OUT, _by_layer_held_out),
    "random_heads_as_written_by_layer": AtOnce(
        "the same with heads drawn like random_heads; mean over draws", _random_by_layer, brief=True
    ),
}
"""Name -> edit."""


def versions_at_once(work: Work, ground: Ground) -> dict[str, tuple[list[str], list[Together]]]:
    """Pass -> (names, versions) of all of AT_ONCE; those with the same read-out share a pass."""
    exact, in_brief = work.model.engine, work.model.engine.over_likeliest_tokens()
    made: dict[str, tuple[list[str], list[Together]]] = {}
    for name, kind in AT_ONCE.items():
        a_pass = "step6_at_once_draws" if kind.brief and in_brief is not exact else "step6_at_once"
        names, versions = made.setdefault(a_pass, ([], []))
        some = kind.versions(ground, work.settings.alpha)
        names.extend([name] * len(some))
        versions.extend(some)
    return made


def edit_at_once(
    work: Work, versions: Mapping[str, tuple[list[str], list[Together]]]
) -> list[tuple[list[str], Effects]]:
    """Run each pass of ``versions``. -> its names and effects."""
    prompts, exact = work.once(evaluated_prompts), work.model.engine
    done = []
    for a_pass, (names, some) in versions.items():
        if some:
            engine = exact if a_pass == "step6_at_once" else exact.over_likeliest_tokens()
            with doing(f"{len(some)} edits at once: {', '.join(dict.fromkeys(names))}"):
                done.append((names, work.repeatable(a_pass, engine.edit_together, prompts, some)))
    return done


def judge_at_once(done: Iterable[tuple[list[str], Effects]], prompts: Prompts) -> dict[str, Any]:
    """The numbers of the edits ``done``, for controls.json."""
    numbers: dict[str, Any] = {}
    by_prompt: dict[str, Any] = {}
    for names, effects in done:
        numbers |= judge_vectors(effects, prompts, names)["per_layer"]["0"]
        of_prompts = mean_over_draws(effects, names)
        by_prompt |= {name: [finite(p) for p in of_name[:, 0]] for name, of_name in of_prompts.items()}
    return {"meaning": {name: AT_ONCE[name].meaning for name in numbers}, "numbers": numbers, "by_prompt": by_prompt}


# --- files -----------------------------------------------------------------------------------------------------------

FV_AS_WRITTEN = File("step6/fv_as_written.pt", read_tensors)


def describe(work: Work, ground: Ground) -> dict[str, Any]:
    """Write fv_as_written.pt, and say for controls.json how it differs from the spec's vector. Without a vector where
    what heads write is not known."""
    arch, known = work.model.arch, ground.clean.writing is not None
    written = vector_as_written(ground) if known else None
    content = {
        "fv_as_written": None if written is None else written.total,
        "by_layer": {} if written is None else written.by_layer,
        "same_as_fv": known and not differs(ground),
        "n_heads": arch.n_heads,
        "head_dim": arch.head_dim,
        "resid_dim": arch.resid_dim,
    }
    work.write(FV_AS_WRITTEN, tensor_bytes(content), content=content)
    lengths = work.once(injections).hidden
    return {
        "mean_norm_hidden": {str(layer): float(norm) for layer, norm in enumerate(lengths)},
        "as_written": {
            "meaning": "what the selected heads really add to the residual stream, mean over clean prompts: W_O z "
            "through the norm and the multiplier that the family puts between, with each prompt's own norm factor",
            "known": known,
            "same_as_fv": content["same_as_fv"],
            **({} if written is None else _compared(ground.fv.numpy(), written.total)),
        },
    }


def _compared(fv: np.ndarray, written: np.ndarray) -> dict[str, float | None]:
    fv_norm, norm = length(fv), length(written)
    with np.errstate(divide="ignore", invalid="ignore"):
        cosine = np.float64(fv @ written.astype(np.float64)) / (fv_norm * norm)
    return {"fv_norm": fv_norm, "norm": norm, "cosine_with_fv": finite(float(cosine))}


def parts_sum_to_vector(content: Mapping[str, Any]) -> bool:
    """Whether the parts by layer in a fv_as_written.pt sum to its vector; without a vector there are none."""
    total, by_layer = content["fv_as_written"], content["by_layer"]
    return not by_layer if total is None else parts_add_up(by_layer, total)
