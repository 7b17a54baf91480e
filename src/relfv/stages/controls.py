"""The controls that Step6's result is held against: every control of control_vectors.py, injected and judged."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from relfv.progress import doing
from relfv.settings import MODEL_SETTINGS
from relfv.stages.as_written import (
    AT_ONCE,
    FV_AS_WRITTEN,
    describe,
    edit_at_once,
    judge_at_once,
    parts_sum_to_vector,
    versions_at_once,
)
from relfv.stages.cie import METRICS
from relfv.stages.control_vectors import (
    CONTROLS,
    N_DRAWS_OF_HEADS,
    N_FIRST_DRAWS,
    Candidates,
    Ground,
    candidate_vectors,
    compared_layers,
)
from relfv.stages.function_vector import FV, TOP_HEADS, heads_of
from relfv.stages.judging import Tried, best_layer, judge_candidates, n_as_good, p_of_draws
from relfv.stages.means import clean_run
from relfv.stages.scores import measure_of, trial_scores
from relfv.stages.stage import Check, Stage, Work
from relfv.stages.step6 import injections
from relfv.stages.step6_summary import STEP6_SUMMARY
from relfv.stages.trials import TRIALS
from relfv.stages.zeroshot import ZERO_SHOT_TRIALS, evaluated, evaluated_prompts
from relfv.store.folder import File, QidFolder
from relfv.store.formats import json_bytes, read_json
from relfv.store.status import QidStatus

if TYPE_CHECKING:
    from relfv.engine.base import Engine

# --- files ---------------------------------------------------------------------------------------------------------

CONTROLS_FILE = File("step6/controls.json", read_json)

# --- the stage -----------------------------------------------------------------------------------------------------


def ground_of(work: Work, prompt_queries: Sequence[int]) -> Ground:
    """The data that the controls of a q_id are made from, for prompts with these queries."""
    settings, deltas = work.settings, work.read(METRICS)
    return Ground(
        work.model.arch,
        work.once(clean_run),
        work.read(TRIALS).clusters,
        trial_scores(deltas.of[measure_of(settings.score_key)], settings.score_key),
        deltas.heads,
        work.read(FV),
        heads_of(work.read(TOP_HEADS)),
        prompt_queries,
        seed=f"{settings.seed}:{work.q_id}",
    )


def _compare(work: Work) -> str:
    model, settings, prompts = work.model, work.settings, work.once(evaluated_prompts)
    ground = ground_of(work, prompts.clusters)
    own = Tried(work.once(injections).effects, range(model.arch.n_layers), ["fv"])
    # First what projects heads on the model's device, which would otherwise wait for the passes queued there.
    described, versions = describe(work, ground), versions_at_once(work, ground)
    tried, norms = _try_all(work, ground, own)
    at_once = edit_at_once(work, versions)
    names = [name for name in CONTROLS if name in norms]
    document = {
        "q_id": work.q_id,
        "meaning": {
            "fv": "the function vector itself: Step6's own numbers",
            **{name: CONTROLS[name].meaning for name in names},
        },
        "alpha": settings.alpha,
        "n_eval": len(prompts),
        "n_queries": len(set(prompts.clusters)),
        "precision": model.precision,
        "compared_layers": compared_layers(model.arch.n_layers),
        "read_in_brief": _read_in_brief(model.engine, [*names, *AT_ONCE]),
        "mean_norm_added": {
            name: settings.alpha * norm for name, norm in {"fv": float(ground.fv.norm()), **norms}.items()
        },
        "notes": list(model.arch.notes),
        **described,
        **judge_candidates(
            tried,
            prompts,
            [question.query for question in work.once(evaluated).questions],
            ground.clean,
            [question.query for question in work.read(TRIALS).questions],
            measure_of(settings.score_key),
        ),
        "at_once": judge_at_once(at_once, prompts),
    }
    work.write(CONTROLS_FILE, json_bytes(document), content=document)
    n_passes = sum(len(some.names) * len(some.layers) for some in tried[1:])
    return f"{sum(len(some.names) for some in tried[1:])} vectors, {n_passes} edits of each prompt"


def _read_in_brief(engine: Engine, names: Iterable[str]) -> list[str]:
    """The names of controls that are read out over fewer tokens than there are."""
    if engine.over_likeliest_tokens() is engine:
        return []
    return [name for name in names if (CONTROLS.get(name) or AT_ONCE[name]).brief]


def _try_all(work: Work, ground: Ground, own: Tried) -> tuple[list[Tried], dict[str, float]]:
    """Inject every control where it belongs, those of the same layers and read-out in one pass, and of draws no more
    than can change what they show. -> ``own`` and what came of each, and the vectors' mean lengths by name."""
    n_layers, exact = work.model.arch.n_layers, work.model.engine
    compared, brief = compared_layers(n_layers), exact.over_likeliest_tokens()
    few = sorted({*compared, work.read(STEP6_SUMMARY)["best_layer"]})
    passes: dict[tuple[str, str], list[str]] = {}
    for name, control in CONTROLS.items():
        kind = "step6_draws" if control.brief and brief is not exact else "step6_controls"
        kind = "step6_held_out" if control.at_all_layers else "step6_rivals" if control.rival_of else kind
        passes.setdefault((kind, control.rival_of), []).append(name)
    made = {a_pass: candidate_vectors(ground, names) for a_pass, names in passes.items()}
    p_of_fv = p_of_draws([own], "fv", compared)[:, 0]
    tried, norms = [own], {}
    for (kind, rival_of), candidates in made.items():
        if not candidates.names:
            continue
        layers = range(n_layers) if kind == "step6_held_out" else few
        if rival_of:
            layers = [best_layer(tried, rival_of, compared)]
        engine = exact if kind in ("step6_held_out", "step6_controls") else brief
        # The claim rests on none of all draws doing as well, so one of the first that does ends it; for as_written's
        # rivals the mean over all is given. On a GPU the rest costs less here than in a pass of its own.
        first = N_DRAWS_OF_HEADS if rival_of or exact.backbone.device.type != "cpu" else N_FIRST_DRAWS
        some, rest = (candidates.draws(which) for which in (slice(first), slice(first, None)))
        begun = _inject(work, engine, kind, some, layers)
        going = {name for name in {*rest.names} if not n_as_good(p_of_draws([begun], name, compared), p_of_fv)}
        if going:
            begun = begun.beside(_inject(work, brief, f"{kind}_more", rest.of_names(going), layers))
        tried.append(begun)
        norms |= candidates.norms() | some.of_names({*rest.names} - going).norms()
    return tried, norms


def _inject(work: Work, engine: Engine, kind: str, candidates: Candidates, layers: Sequence[int]) -> Tried:
    vectors = [work.settings.alpha * part for part in candidates.at(layers)]
    names = ", ".join(dict.fromkeys(candidates.names))
    with doing(f"{len(candidates.names)} vectors after {len(layers)} layers each: {names}"):
        effects = work.repeatable(kind, engine.inject, work.once(evaluated_prompts), vectors, layers)
    return Tried(effects, layers, candidates.names)


def _agrees(folder: QidFolder, _: QidStatus) -> Iterator[Check]:
    path = folder.path(FV_AS_WRITTEN)
    yield Check(path, "layers' parts that sum to its vector", parts_sum_to_vector(folder.read(FV_AS_WRITTEN)))


STAGE = Stage(
    "step6_controls",
    "The vector held out at every layer, and beside vectors that carry no relation at some.",
    _compare,
    reads=(TRIALS, ZERO_SHOT_TRIALS, METRICS, FV, TOP_HEADS, STEP6_SUMMARY),
    writes=(CONTROLS_FILE, FV_AS_WRITTEN),
    settings=(*MODEL_SETTINGS, "alpha", "n_eval", "allow_query_duplicates", "seed", "score_key"),
    agrees=_agrees,
    extra=True,
    share=0.4,
)
