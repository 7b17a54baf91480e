"""The per-head statistics end to end, from a relation to top_heads.json, where the truth is known: labels that carry no
relation, and a model in which one head alone carries it. docs/statistics.md has the figures of more relations and
runs."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from head_statistics import mixed, scrambled
from planted import RELATIONS, leave_one_head_after_layer_1
from relfv.language_model import LanguageModel, open_model
from relfv.models.tokens import Tokens
from relfv.settings import Settings
from relfv.stages import function_vector
from relfv.stages.function_vector import TOP_HEADS
from relfv.stages.noise_floor import NOISE_FLOOR
from relfv.stages.prompts import AnswerTokens
from relfv.stages.scores import CIE
from relfv.stages.stage import Work
from relfv.stages.table import STEP_D
from relfv.stages.trials import sample_trials
from relfv.stats import FDR
from relfv.store.folder import QidFolder
from relfv.types import HeadId, Relation, ScoredHead

pytestmark = pytest.mark.slow
SPEC = Settings(model="demo")
N_NULL = 6


@pytest.fixture(scope="module")
def demo() -> LanguageModel:
    return open_model("demo")


def run_step_d(model: LanguageModel, relation: Relation, folder: Path) -> Work:
    """StepD at the spec's settings: 25 trials, 9 demos."""
    assert (SPEC.n_trials_per_q, SPEC.n_demos) == (25, 9)
    of_qid = QidFolder(folder / relation.q_id / "artifacts", relation.q_id)
    work = Work(of_qid, SPEC, lambda: model, relation=relation, csv_sha256="0" * 64)
    for stage in STEP_D:
        stage.step().run(work)
    return work


@pytest.mark.parametrize("make", [scrambled, mixed])
def test_heads_are_not_called_where_labels_carry_no_relation(
    demo: LanguageModel, make: Callable[..., Relation], tmp_path: Path
) -> None:
    """p < 0.05 may be found in 5 % of heads. Heads of one relation share its trials, so relations are what is counted:
    over 40 of them the share had a standard deviation of 1.9 points (docs/statistics.md), and three standard errors of
    a mean over six are 2.3. If no head has an effect, a relation in which any is called is one in twenty at most; two
    among six would have a probability of 3 %."""
    shares, with_calls = [], 0
    for i in range(N_NULL):
        relation = make(RELATIONS, 12, random.Random(f"test:{i}"))
        scored = run_step_d(demo, relation, tmp_path / str(i)).read(CIE)
        assert len(scored) == 128
        shares.append(np.mean([head.scores["mean_delta_p_p_value"] < 0.05 for head in scored]))
        with_calls += any(head.scores["mean_delta_p_fdr"] <= FDR for head in scored)
    assert np.mean(shares) < 0.05 + 0.023
    assert with_calls <= 1


@pytest.mark.parametrize("planted", [HeadId(2, 8), HeadId(2, 9)], ids=str)
def test_the_one_head_that_carries_the_relation_is_found_with_its_true_effect(planted: HeadId, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    dead = leave_one_head_after_layer_1(planted, folder)
    model = open_model(str(folder))
    relation = RELATIONS["Q27"]
    work = run_step_d(model, relation, tmp_path)
    function_vector.STAGE.step().run(work)
    top = json.loads(work.folder.path(TOP_HEADS).read_text())["heads"]

    first = top[0]
    assert (first["layer"], first["head"]) == (planted.layer, planted.head)
    assert first["distinguishable"]
    assert first["in_top_k"] == 1
    effect = true_effect(PlainHooks(folder), model.tokens, relation, planted)
    assert effect > 0.3
    assert first["mean_delta_p_ci_low"] < effect < first["mean_delta_p_ci_high"]
    assert first["leave_query_out"]["ci_low"] < effect < first["leave_query_out"]["ci_high"]
    assert first["mean_delta_p_ci_low"] > 0.1

    listed = [head for head in top if HeadId(head["layer"], head["head"]) in dead]
    assert listed  # the top 20 reach down to them
    assert not any(head["distinguishable"] for head in listed)
    floor = work.read(NOISE_FLOOR)["other_shape"]["p"]["max"]
    swept = {head.id: head for head in work.read(CIE)}
    assert not any(is_called(swept[head], floor) for head in dead)
    assert is_called(swept[planted], floor)


def is_called(head: ScoredHead, floor: float) -> bool:
    return head.scores["mean_delta_p_fdr"] <= FDR and abs(head.scores["mean_delta_p"]) > floor


class PlainHooks:
    """The saved model through transformers alone; prompts of one length share a pass, so nothing is padded."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def read(
        self, prompts: list[str], targets: list[int], head: HeadId, value: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, np.ndarray]:
        """z of the head at the last token (prompt, head_dim), before it is set to ``value``, and P of the targets."""
        width = self.model.config.head_dim
        own = slice(head.head * width, (head.head + 1) * width)
        seen: list[torch.Tensor] = []

        def hook(_: torch.nn.Module, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            z = arguments[0].clone()
            seen.append(z[:, -1, own].clone())
            if value is not None:
                z[:, -1, own] = value
            return (z,)

        ids = [self.tokenizer(prompt).input_ids for prompt in prompts]
        found, p = torch.empty(len(ids), width), np.empty(len(ids))
        handle = self.model.model.layers[head.layer].self_attn.o_proj.register_forward_pre_hook(hook)
        with torch.inference_mode():
            for length in {len(prompt) for prompt in ids}:
                rows = [i for i, prompt in enumerate(ids) if len(prompt) == length]
                logits = self.model(torch.tensor([ids[i] for i in rows]), logits_to_keep=1).logits[:, -1]
                p[rows] = logits.double().softmax(-1)[range(len(rows)), [targets[i] for i in rows]].numpy()
                found[rows] = seen.pop()
        handle.remove()
        return found, p


def true_effect(model: PlainHooks, tokens: Tokens, relation: Relation, head: HeadId) -> float:
    """Mean delta_p over 200 fresh trials, patched with the clean mean of the same 200; its standard error is about
    0.02."""
    answers = AnswerTokens(relation, tokens)
    trials = [answers.prompted(t) for t in sample_trials(relation, seed=1, n_trials=200, n_demos=9)]
    targets = [trial.target.token_id for trial in trials]
    clean_mean = model.read([trial.clean_prompt for trial in trials], targets, head)[0].mean(0)
    corrupted = [trial.corrupted_prompt for trial in trials]
    patched, base = (model.read(corrupted, targets, head, value)[1] for value in (clean_mean, None))
    return float((patched - base).mean())
