"""Every read and write of the artifact contract: which file holds what, under which name.

Nothing here computes. Writers take typed values and return the path; readers give them back; every file is written
atomically (storage.py). Floats keep every digit, so a stage that reads its input from disk and one that has it in
memory give the same bytes.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from relfv.errors import InputError, RunError
from relfv.relations import is_q_id
from relfv.stats import Stability
from relfv.store.files import (
    SEAL,
    json_bytes,
    read_json,
    sealed,
    sha256_bytes,
    sha256_file,
    unsealed,
    write_atomic,
    write_json,
    write_together,
)
from relfv.types import (
    MEASURES,
    ArithmeticNoise,
    FunctionVector,
    HeadEffects,
    HeadId,
    MeanActivations,
    NoiseFloor,
    PromptedTrial,
    ScoredHead,
)

_HEAD_COLUMNS = [
    *(
        name
        for m in MEASURES
        for name in (
            f"mean_delta_{m}",
            f"std_delta_{m}",
            f"mean_abs_delta_{m}",
            f"mean_{m}_base",
            f"mean_{m}_patch",
        )
    ),
    "clean_mean_norm",
    *(f"mean_delta_p_{name}" for name in ("se", "ci_low", "ci_high", "p_value", "fdr")),
]


MANIFEST = "run_manifest.json"
"""Beside the q_ids' folders."""
CROSS, CROSS_FIGURE = "cross_fv.json", "cross_fv.png"
"""There as well: they rest on several q_ids."""
CROSS_SETTINGS = ("model_spec", "dtype", "quant", "precision", "model_identity", "algorithm_version")
"""Fingerprint fields that q_ids must share for their vectors to be compared."""
_TARGET_SETTINGS = ("alpha", "n_eval", "allow_query_duplicates", *CROSS_SETTINGS)


@dataclass(frozen=True)
class QidPaths:
    """Where the files of one q_id are. ``artifacts`` is ``<out_root>/<REL>/<Q>/artifacts``."""

    artifacts: Path
    q_id: str

    @property
    def log(self) -> Path:
        """The run's log for this q_id."""
        return self.artifacts.parent / "logs" / "stepD_aie.log"

    @property
    def lock(self) -> Path:
        """Held by whoever writes into this q_id's folder."""
        folder = self.artifacts.resolve().parent
        return folder.parent / ".locks" / f"{folder.name}.lock"

    @property
    def trials(self) -> Path:
        """Frozen after StepD."""
        return self.artifacts / "sampled_trials.json"

    @property
    def zero_shot_trials(self) -> Path:
        """The same trials without demos."""
        return self.artifacts / "sampled_trials_zeroshot.json"

    @property
    def metrics(self) -> Path:
        """A row for every (trial, layer, head)."""
        return self.artifacts / "trial_metrics.jsonl"

    @property
    def cie(self) -> Path:
        """A row a head."""
        return self.artifacts / "cie_scores.csv"

    @property
    def aie(self) -> Path:
        """A row a head over the q_ids of the run, ranked."""
        return self.artifacts / "aie_scores.csv"

    @property
    def noise_floor(self) -> Path:
        """What arithmetic alone makes of an effect."""
        return self.artifacts / "stepD_cie" / "noise_floor.json"

    @property
    def head_stability(self) -> Path:
        """How much the list of top heads depends on which queries were drawn."""
        return self.artifacts / "head_stability.json"

    @property
    def means(self) -> Path:
        """Mean clean activations of this q_id."""
        return self.artifacts / "stepD_mean_acts" / f"qid_{self.q_id}_clean_mean.pt"

    @property
    def global_means(self) -> Path:
        """The same over the q_ids of the run: here one."""
        return self.artifacts / "stepD_mean_acts" / "global_clean_mean.pt"

    @property
    def sweeps(self) -> Path:
        """Other alphas and k, where asked for."""
        return self.step6 / "sweeps.json"

    @property
    def heatmap(self) -> Path:
        """Layers x heads."""
        return self.artifacts / f"aie_heatmap_{self.q_id}.png"

    @property
    def top_heads(self) -> Path:
        """The heads of the function vector."""
        return self.artifacts / "top_heads.json"

    @property
    def fv(self) -> Path:
        """The function vector."""
        return self.artifacts / "fv_global_resid.pt"

    @property
    def fv_meta(self) -> Path:
        """What the vector is made of."""
        return self.artifacts / "fv_global_resid_meta.json"

    @property
    def fv_by_layer(self) -> Path:
        """The vector split by the layer its heads are in."""
        return self.artifacts / "fv_by_layer.pt"

    @property
    def step_e_eval(self) -> Path:
        """Quick check of the vector on the frozen trials."""
        return self.artifacts / "stepE_eval.json"

    @property
    def step6(self) -> Path:
        """One folder a layer, and their summary."""
        return self.artifacts / "step6"

    def step6_layer(self, layer: int) -> Path:
        """Results of injecting at ``layer``."""
        return self.step6 / f"layer_{layer}"

    @property
    def step6_summary(self) -> Path:
        """All layers together."""
        return self.step6 / "step6_all_layers_summary.json"

    @property
    def controls(self) -> Path:
        """The vector beside what it is to be held against, at every layer."""
        return self.step6 / "controls.json"

    @property
    def answers(self) -> Path:
        """Whole answers at the best layer."""
        return self.step6 / "answers.json"

    @property
    def summary(self) -> Path:
        """What may be concluded, in numbers and words."""
        return self.artifacts / "summary.json"

    @property
    def curve(self) -> Path:
        """P and accuracy over layers."""
        return self.step6 / "injection_curve.png"


@dataclass(frozen=True)
class TrialSnapshot:
    """A sampled_trials file: its meta, and for each trial what later stages need."""

    meta: dict[str, Any]
    trials: list[dict[str, Any]]
    """The file's own trial objects, complete."""
    queries: list[int]
    """The query of every trial, by the first row that has its input: trials that share it are no independent observations."""

    def prompts(self, key: str) -> list[str]:
        """``clean_prompt_str`` or ``corrupted_prompt_str`` of every trial."""
        return [trial[key] for trial in self.trials]

    @property
    def target_ids(self) -> list[int]:
        """First answer token of every trial."""
        return [trial["target_first_token_id"] for trial in self.trials]

    def only(self, chosen: Iterable[int]) -> TrialSnapshot:
        """The same with the trials of these indices."""
        kept = list(chosen)
        return TrialSnapshot(self.meta, [self.trials[i] for i in kept], [self.queries[i] for i in kept])


def trials_document(
    prompted: Sequence[PromptedTrial], meta: dict[str, Any], collisions: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """The content of sampled_trials.json."""
    targets = [item.target for item in prompted]
    counted = {
        **meta,
        "n_labels_left_in_place": sum(item.trial.n_labels_in_place for item in prompted),
        "n_answers_tokenised_alone": sum(not target.joint for target in targets),
        "first_token_collisions": list(collisions),
    }
    return {"meta": counted, "trials": [_trial(item) for item in prompted]}


def zero_shot_document(snapshot: TrialSnapshot, prompt_format: str, prompts: Sequence[str]) -> dict[str, Any]:
    """The content of sampled_trials_zeroshot.json: the same queries and targets, no demos."""
    kept = ("q_id", "trial_id", "trial_idx", "query", "query_source_index", "target_str")
    ids = ("target_first_token_id", "answer_ids")
    return {
        "meta": {**snapshot.meta, "zero_shot": True, "prompt_format": prompt_format},
        "trials": [
            {
                **{key: trial[key] for key in kept},
                "corrupted_prompt_str": prompt,
                **{key: trial[key] for key in ids},
            }
            for trial, prompt in zip(snapshot.trials, prompts, strict=True)
        ],
    }


def read_trials(path: Path) -> TrialSnapshot:
    """Read either kind of snapshot. Raises InputError if it is missing, RunError if it is not one."""
    if not path.exists():
        raise InputError(f"{path}: no such file; expected a trial snapshot, as StepD or 'relfv zeroshot' write it")
    document = read_json(path)
    try:
        snapshot = TrialSnapshot(document["meta"], document["trials"], _queries(document["trials"]))
        _ = snapshot.target_ids, snapshot.prompts("corrupted_prompt_str")
        if not all(is_q_id(trial["q_id"]) for trial in snapshot.trials):  # file names are made of it
            raise KeyError("q_id")
    except (KeyError, TypeError):
        raise RunError(f"{path}: is not a trial snapshot; expected meta and trials as StepD writes them") from None
    if not snapshot.trials:
        raise RunError(f"{path}: holds no trials")
    return snapshot


def _queries(trials: Sequence[dict[str, Any]]) -> list[int]:
    """Rows that have the same input count as one query: a pair that stands in the CSV twice is no two observations."""
    first: dict[tuple[str, str], int] = {}
    words = [(trial["q_id"], trial["query"]["input"]) for trial in trials]
    for i, (word, trial) in enumerate(zip(words, trials, strict=True)):
        row = trial.get("query_source_index", i)  # snapshots of other tools
        first[word] = min(first.get(word, row), row)
    return [first[word] for word in words]


def _trial(item: PromptedTrial) -> dict[str, Any]:
    trial, target = item.trial, item.target
    return {
        "q_id": trial.q_id,
        "trial_id": trial.trial_id,
        "trial_idx": trial.trial_idx,
        "query_source_index": trial.query_source_index,
        "demo_source_indices": list(trial.demo_source_indices),
        "demos_clean": [vars(pair) for pair in trial.demos_clean],
        "demos_corrupted": [vars(pair) for pair in trial.demos_corrupted],
        "query": vars(trial.query),
        "clean_prompt_str": item.clean_prompt,
        "corrupted_prompt_str": item.corrupted_prompt,
        "target_str": trial.query.output,
        "target_first_token_id": target.first_token_id,
        "answer_ids": list(target.answer_ids),
        "answer_tokenised_with_prompt": target.joint,
        "n_labels_in_place": trial.n_labels_in_place,
    }


def write_means(path: Path, means: MeanActivations, slot_q: Sequence[str], resid_dim: int) -> Path:
    """``clean_mean`` (layer, head, head_dim) float32 with its dimensions."""
    _, n_heads, head_dim = means.values.shape
    return _write_tensors(
        path,
        {
            "clean_mean": means.values,
            "slot_q": list(slot_q),
            "n_prompts": means.n_prompts,
            "n_heads": n_heads,
            "head_dim": head_dim,
            "resid_dim": resid_dim,
        },
    )


def read_means(path: Path) -> MeanActivations:
    """The inverse of ``write_means``; files of other tools may lack ``n_prompts``."""
    content = _read_tensors(path, "clean_mean")
    return MeanActivations(values=content["clean_mean"].float(), n_prompts=int(content.get("n_prompts", 0)))


def write_head_effects(paths: QidPaths, effects: HeadEffects, target_ids: Sequence[int]) -> Path:
    """trial_metrics.jsonl: a row for every (trial, layer, head)."""
    base, patched = effects.effects.base.measures(), effects.effects.edited.measures()
    q_id = json.dumps(paths.q_id)
    lines = []
    for trial_idx, target in enumerate(target_ids):
        before = {m: base[m][trial_idx] for m in MEASURES}
        columns: list[list[str]] = []
        for m in MEASURES:
            after = patched[m][trial_idx]
            _require_finite(after, f"{paths.metrics.name}, trial {trial_idx}, {m}")
            columns.append([repr(value) for value in after.tolist()])
            columns.append([repr(value) for value in (after - before[m]).tolist()])
        fixed = f'{{"q_id": {q_id}, "trial_idx": {trial_idx}, "layer": '
        p, logit, logprob = (repr(float(before[m])) for m in MEASURES)
        for head, *v in zip(effects.heads, *columns, strict=True):
            lines.append(
                f'{fixed}{head.layer}, "head": {head.head}, "target_id": {target}, '
                f'"p_base": {p}, "p_patch": {v[0]}, "delta_p": {v[1]}, '
                f'"logit_base": {logit}, "logit_patch": {v[2]}, "delta_logit": {v[3]}, '
                f'"logprob_base": {logprob}, "logprob_patch": {v[4]}, "delta_logprob": {v[5]}}}\n'
            )
    data = "".join(lines).encode()
    _deltas_of.clear()
    _deltas_of[sha256_bytes(data)] = effects.heads, {m: patched[m] - base[m][:, None] for m in MEASURES}
    return write_atomic(paths.metrics, data)


def read_deltas(path: Path, measure: str) -> tuple[list[HeadId], np.ndarray]:
    """From trial_metrics.jsonl the heads, sorted, and float64 (trial, head): delta of ``measure``, one of MEASURES."""
    try:
        data = path.read_bytes()
        kept = _deltas_of.get(digest := sha256_bytes(data))
        if kept is None:
            _deltas_of.clear()
            kept = _deltas_of[digest] = _parse_deltas(data)
        heads, found = kept[0], kept[1][measure]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as problem:
        raise RunError(f"{path}: is not a file of head effects as StepD writes them ({problem!r})") from None
    _require_finite(found, path.name)
    return list(heads), found.copy()


_Deltas = tuple[Sequence[HeadId], dict[str, np.ndarray]]
_deltas_of: dict[str, _Deltas] = {}
"""Of the trial_metrics.jsonl that was last written or read, by its sha256: parsing 25,600 rows again takes longer than what
is done with them."""


def _parse_deltas(data: bytes) -> _Deltas:
    rows = [json.loads(line) for line in data.splitlines()]
    heads = sorted({HeadId(row["layer"], row["head"]) for row in rows})
    column = {head: i for i, head in enumerate(heads)}
    n_trials = 1 + max(row["trial_idx"] for row in rows)
    measures = [m for m in MEASURES if f"delta_{m}" in rows[0]]
    deltas = {m: np.full((n_trials, len(heads)), np.nan) for m in measures}
    for row in rows:
        at = row["trial_idx"], column[HeadId(row["layer"], row["head"])]
        for m in measures:
            deltas[m][at] = row[f"delta_{m}"]
    return heads, deltas


def write_scores(paths: QidPaths, scored: Sequence[ScoredHead], ranked: Sequence[ScoredHead]) -> list[Path]:
    """cie_scores.csv in layer, head order, and aie_scores.csv with the same heads in the order of ``ranked``."""
    numbers = {head.id: [repr(head.scores[name]) for name in _HEAD_COLUMNS] for head in scored}
    cie = [["q_id", "layer", "head", "n_trials", *_HEAD_COLUMNS]]
    cie += [[paths.q_id, *_ids(head), str(head.n_trials), *numbers[head.id]] for head in scored]
    aie = [["layer", "head", "n_qid", *_HEAD_COLUMNS]]
    aie += [[*_ids(head), "1", *numbers[head.id]] for head in ranked]
    return [_write_csv(paths.cie, cie), _write_csv(paths.aie, aie)]


def write_head_stability(
    paths: QidPaths, stability: Stability, shares: Mapping[HeadId, float], *, k: int, score_key: str
) -> Path:
    """head_stability.json: ``shares`` is the stability's ``in_top_k`` by head; heads that never are, are left out."""
    often = sorted((head for head in shares if shares[head] > 0), key=lambda head: (-shares[head], head))
    return write_json(
        paths.head_stability,
        {
            "q_id": paths.q_id,
            "meaning": "in_top_k: in what share of bootstrap samples of the queries the head is among the k best. "
            "half_overlap: what share of the k best two halves of the queries have in common, on average; "
            "chance_overlap is that of two lists drawn at random.",
            "k": k,
            "score_key": score_key,
            "n_bootstrap": stability.n_bootstrap,
            "n_halvings": stability.n_halvings,
            "half_overlap": finite(stability.half_overlap),
            "chance_overlap": stability.chance_overlap,
            "heads": [{"layer": head.layer, "head": head.head, "in_top_k": shares[head]} for head in often],
        },
    )


def finite(value: float) -> float | None:
    """JSON knows neither infinities nor NaN: None there."""
    return value if math.isfinite(value) else None


def write_noise_floor(
    paths: QidPaths, floor: NoiseFloor, *, trials_per_pass: int, n_heads: int, arithmetic: dict[str, Any]
) -> Path:
    """stepD_cie/noise_floor.json: the noise beside the sweep's own batch shape, ``n_heads`` a trial, and the
    ``arithmetic`` both ran in."""
    noise = floor.other_shape.largest
    found = (
        f"On a single trial an effect below {noise['p']:.1g} in p, {noise['logit']:.1g} in logit or "
        f"{noise['logprob']:.1g} in logprob cannot be told from arithmetic; means over trials are steadier than that."
        if any(noise.values())
        else "On this device and model the batch's shape made no difference at all to the effects measured."
    )
    return write_json(
        paths.noise_floor,
        {
            "q_id": paths.q_id,
            "meaning": "Both numbers would be 0 if sums were exact. identity: a head is given its own value back, by the "
            "sweep's own kernels. other_shape: the same effect from a batch of another shape, and from finer pieces where "
            f"products are put together from pieces. {found}",
            **arithmetic,
            "trials_per_pass": trials_per_pass,
            "heads_per_trial": n_heads,
            "heads": [{"layer": head.layer, "head": head.head} for head in floor.heads],
            "n_trials": floor.n_trials,
            "identity": _noise(floor.identity),
            "other_shape": {**_noise(floor.other_shape), "heads_per_trial": len(floor.heads)},
        },
    )


def _noise(found: ArithmeticNoise) -> dict[str, Any]:
    differences = {m: {"max": found.largest[m], "median": found.median[m]} for m in MEASURES}
    return {**differences, "trials_per_pass": found.per_pass}


def read_noise_floor(path: Path) -> dict[str, Any]:
    """The file as it is. Raises RunError if it is missing or not one."""
    content = read_json(path)
    try:
        _ = [float(content[way][m]["max"]) for way in ("identity", "other_shape") for m in MEASURES]
    except (KeyError, TypeError, ValueError):
        raise RunError(f"{path}: is not a noise floor as StepD writes it") from None
    return content


def read_top_heads(path: Path) -> list[HeadId]:
    """The function vector's heads, best first."""
    try:
        return [HeadId(head["layer"], head["head"]) for head in read_json(path)["heads"]]
    except (KeyError, TypeError):
        raise RunError(f"{path}: is not a list of top heads as StepE writes it") from None


def read_scores(path: Path) -> list[ScoredHead]:
    """Rows of cie_scores.csv or aie_scores.csv, in file order; ``n_trials`` is 0 where the file has none."""
    try:
        rows = list(csv.DictReader(io.StringIO(path.read_text())))
        scored = [
            ScoredHead(
                HeadId(int(row["layer"]), int(row["head"])),
                {name: float(value) for name, value in row.items() if name in _HEAD_COLUMNS},
                int(row.get("n_trials") or 0),
            )
            for row in rows
        ]
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; run StepD first") from None
    except (OSError, KeyError, TypeError, ValueError) as problem:
        raise RunError(f"{path}: is not a head score file ({problem!r})") from None
    if not scored:
        raise RunError(f"{path}: holds no heads")
    return scored


def require_score(scored: Sequence[ScoredHead], score_key: str, path: Path) -> None:
    """Raise InputError if ``score_key`` is not a column of ``path``."""
    if score_key not in scored[0].scores:
        raise InputError(f"{score_key!r} is not a column of {path}; expected one of {', '.join(scored[0].scores)}")


def _ids(head: ScoredHead) -> list[str]:
    return [str(head.id.layer), str(head.id.head)]


def write_function_vector(
    paths: QidPaths, fv: FunctionVector, meta: dict[str, Any], *, alpha: float, n_heads: int, head_dim: int
) -> list[Path]:
    """fv_global_resid.pt, its meta, and fv_by_layer.pt."""
    sizes = {"resid_dim": fv.total.numel(), "n_heads": n_heads, "head_dim": head_dim}
    return [
        _write_tensors(paths.fv, {"fv_global_resid": fv.total, **sizes}),
        write_json(paths.fv_meta, meta),
        _write_tensors(
            paths.fv_by_layer,
            {
                "fv_by_layer": fv.by_layer,
                "selected_k": len(fv.heads),
                "alpha_default": alpha,
                **sizes,
                "model_spec": meta["model_spec"],
            },
        ),
    ]


def read_function_vector(path: Path) -> torch.Tensor:
    """float32 (resid_dim,) of a fv_global_resid.pt."""
    return _read_tensors(path, "fv_global_resid")["fv_global_resid"].float()


def read_fv_by_layer(path: Path) -> dict[int, torch.Tensor]:
    """layer -> float32 (resid_dim,) of a fv_by_layer.pt. Raises RunError if it is missing or not one."""
    content = _load(path)
    parts = content.get("fv_by_layer") if isinstance(content, dict) else None
    if not isinstance(parts, dict) or not all(isinstance(part, torch.Tensor) for part in parts.values()):
        raise RunError(f"{path}: has no vectors by layer")
    return {int(layer): part.float() for layer, part in parts.items()}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file. Raises RunError that names the file and the line that is none."""
    rows: list[dict[str, Any]] = []
    try:
        for line in path.read_bytes().splitlines():
            rows.append(dict(json.loads(line)))
    except OSError as problem:
        raise RunError(f"{path}: cannot be read ({problem.strerror})") from None
    except (ValueError, TypeError):
        raise RunError(f"{path}: line {len(rows) + 1} is not a JSON object") from None
    return rows


def write_step6_layer(
    folder: Path,
    *,
    results_name: str,
    results: dict[str, Any],
    summary: dict[str, Any],
    trials: Iterable[dict[str, Any]],
    meta: dict[str, Any],
) -> list[Path]:
    """The four files of one layer; the results file, which the summary looks for, last. It takes the place of one with
    another n or model in its name: a layer has one result."""
    lines = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in trials)
    files = write_together(
        {
            folder / "eval_summary.json": json_bytes(summary),
            folder / "eval_trials.jsonl": lines.encode(),
            folder / "eval_meta.json": json_bytes(meta),
            folder / results_name: json_bytes(results),
        }
    )
    for earlier in folder.glob("step6_results_*.json"):
        if earlier.name != results_name:
            earlier.unlink()
    return files


def results_name(model: str, layer: int, n_eval: int) -> str:
    """``step6_results_<model>_layer<l>_n<N>.json``; of a long path the end is kept, which tells models apart."""
    safe = re.sub(r"[^A-Za-z0-9.-]", "_", model)[-150:]
    return f"step6_results_{safe}_layer{layer}_n{n_eval}.json"


def find_results(folder: Path) -> Path | None:
    """The results file of one layer's folder, if it has one."""
    return next(iter(sorted(folder.glob("step6_results_*.json"))), None)


def cross_origin(folder: Path, target: str, sources: Sequence[str], fields: Mapping[str, Any]) -> dict[str, Any]:
    """What the numbers of one ``target`` in cross_fv.json rest on, as it now is: settings, out of the q_id's fingerprint
    ``fields``, and the sha256 of files by their names in the relation's ``folder``; None where one is missing."""
    own = QidPaths(folder / target / "artifacts", target)
    vectors = [QidPaths(folder / source / "artifacts", source).fv for source in sources]
    return {
        "settings": {name: fields.get(name) for name in _TARGET_SETTINGS},
        "files": {
            path.relative_to(folder).as_posix(): sha256_file(path)
            for path in (own.zero_shot_trials, own.step6_summary, *vectors)
        },
    }


def write_cross(folder: Path, document: dict[str, Any], figure: bytes) -> Path:
    """cross_fv.png, then cross_fv.json with the picture's hash and its own. Call as ``sole_writer``."""
    content = sealed({**document, "figure": {CROSS_FIGURE: sha256_bytes(figure)}})
    return write_together({folder / CROSS_FIGURE: figure, folder / CROSS: json_bytes(content)})[-1]


def read_cross(folder: Path) -> dict[str, Any]:
    """What ``write_cross`` wrote, without its own hash. Raises RunError if it is missing or not as it was written."""
    path = folder / CROSS
    found = read_json(path)
    try:
        sound = {SEAL, "verdict"} <= found.keys() and CROSS_FIGURE in found["figure"]
        sound &= all(map(is_q_id, found["q_ids"])) and set(found["targets"]) <= set(found["q_ids"])
        sound &= all({"made_from", "best_layer", "per_layer"} <= entry.keys() for entry in found["targets"].values())
    except (AttributeError, KeyError, TypeError):
        sound = False
    if not sound:
        raise RunError(f"{path}: is damaged or not a file of relfv cross")
    return unsealed(found, path)


def cross_changes(folder: Path, document: dict[str, Any], fields: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What ``document``, as ``read_cross`` gives it, was made from and is another now, in words. ``fields`` are the
    fingerprint fields of each q_id, and empty for one that is gone."""
    changes: dict[str, None] = {}
    for target, entry in document["targets"].items():
        then, now = entry["made_from"], cross_origin(folder, target, document["q_ids"], fields[target])
        changes |= {
            f"{target}'s {name} was {value}, now {now['settings'][name]}": None
            for name, value in then["settings"].items()
            if now["settings"].get(name) != value
        }
        changes |= {
            f"made from another {name}": None
            for name, digest in then["files"].items()
            if now["files"].get(name) != digest
        }
    return list(changes)


def _write_csv(path: Path, rows: list[list[str]]) -> Path:
    buffer = io.StringIO(newline="")
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return write_atomic(path, buffer.getvalue().encode())


def _write_tensors(path: Path, content: dict[str, Any]) -> Path:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return write_atomic(path, buffer.getvalue())


def _read_tensors(path: Path, key: str) -> dict[str, Any]:
    content = _load(path)
    if not isinstance(content, dict) or not isinstance(content.get(key), torch.Tensor):
        raise RunError(f"{path}: has no tensor {key!r}")
    return content


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; an earlier stage has not run") from None
    except Exception as problem:  # torch.load raises many kinds for a damaged file; all mean the same here
        raise RunError(f"{path}: cannot be read as a tensor file ({type(problem).__name__})") from None


def _require_finite(values: np.ndarray, where: str) -> None:
    if not np.isfinite(values).all():
        raise RunError(
            f"{where}: the model gave NaN or infinite scores; expected finite numbers (fp16 overflows in some models: "
            "use --dtype bf16, or --precision exact)"
        )
