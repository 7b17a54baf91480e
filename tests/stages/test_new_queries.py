from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import WORDS
from folders import arguments, contents, status
from relfv.cli import main
from relfv.relations import load_relations
from relfv.settings import Settings
from relfv.stages.injection import Injections
from relfv.stages.new_queries import numbers_of, trials_of_new_queries, verdict_of
from relfv.stages.trials import sample_trials
from relfv.types import Effects, Prompts, TokenScores

QUERIES = "step6/new_queries.json"


@pytest.fixture(scope="module")
def asked(finished: Path, csv_path: Path, llama_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, to which the study was added afterwards."""
    out = tmp_path_factory.mktemp("asked")
    folder = Path(shutil.copytree(finished, out / "pairs"))
    assert main(arguments(llama_path, csv_path, out, "--q_list", "A1", "--extras", "new_queries")) == 0
    assert main(["verify", str(folder)]) == 0
    return folder


def test_where_trials_ask_every_row_the_study_says_so_and_the_page_shows_the_q_id(
    llama_path: Path, tmp_path: Path
) -> None:
    csv = tmp_path / "few.csv"
    csv.write_text("id,ex_A,ex_B\n" + "".join(f"A1,{a},{b}\n" for a, b in WORDS[:10]), encoding="utf-8")
    command = arguments(llama_path, csv, tmp_path, "--n_trials_per_q", "60", "--extras", "new_queries")
    assert main(command) == 0
    assert json.loads((tmp_path / "few/A1/artifacts" / QUERIES).read_text())["n_queries"] == 0
    assert "The trials ask every row of the relation" in (tmp_path / "few/report/index.html").read_text()
    assert main(["verify", str(tmp_path / "few")]) == 0


def test_a_finished_q_id_gets_the_study_and_nothing_else_of_it_changes(
    finished: Path, asked: Path, csv_path: Path, llama_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = (contents(folder / "A1/artifacts") for folder in (finished, asked))
    assert after.keys() - before.keys() == {QUERIES}
    assert {name: after[name] for name in before} == before
    assert status(asked, "A1")["status"] == "completed"
    command = arguments(llama_path, csv_path, asked.parent, "--q_list", "A1")
    assert main([*command, "--dry_run"]) == 0
    assert "completed" in capsys.readouterr().out
    assert main([*command, "--extras", "new_queries"]) == 0
    assert "everything is completed" in capsys.readouterr().err
    page = (asked / "report/index.html").read_text()
    assert "Queries that no trial asks" in page


def test_rows_of_no_trial_are_asked_each_input_once_and_demos_leave_the_query_out(csv_path: Path) -> None:
    relation = load_relations(csv_path)["A1"]
    settings = Settings(n_demos=3)
    queries = {t.query.input for t in sample_trials(relation, seed=0, n_trials=4, n_demos=3)}
    new = trials_of_new_queries(relation, settings, queries)
    inputs = [trial.query.input for trial in new]
    assert sorted(inputs) == sorted({pair.input for pair in relation.pairs} - queries)
    assert all(trial.query.input not in {demo.input for demo in trial.demos_clean} for trial in new)
    assert len(trials_of_new_queries(relation, Settings(n_demos=3, n_eval=2), queries)) == 2
    assert trials_of_new_queries(relation, settings, {pair.input for pair in relation.pairs}) == []


def test_numbers_are_those_of_plain_forward_passes(asked: Path, llama_path: Path) -> None:
    artifacts = asked / "A1/artifacts"
    document = json.loads((artifacts / QUERIES).read_text())
    trials = json.loads((artifacts / "sampled_trials.json").read_text())["trials"]
    assert document["n_queries"] == len(document["queries"]) > 0
    assert not {row["query"] for row in document["queries"]} & {trial["query"]["input"] for trial in trials}
    model, tokenizer = AutoModelForCausalLM.from_pretrained(llama_path), AutoTokenizer.from_pretrained(llama_path)
    vector = torch.load(artifacts / "fv_global_resid.pt", weights_only=True)["fv_global_resid"]

    def add(_module, _args, output):  # type: ignore[no-untyped-def]
        hidden = output[0] if isinstance(output, tuple) else output
        hidden[:, -1] += vector

    for row in document["queries"]:
        prompt = tokenizer(f"Q: {row['query']}\nA:", return_tensors="pt").input_ids
        target = tokenizer(f"Q: {row['query']}\nA: {row['answer']}").input_ids[prompt.shape[1]]
        with torch.inference_mode():
            base = model(prompt).logits[0, -1].softmax(-1)[target]
            with model.model.layers[document["layer"]].register_forward_hook(add):
                edited = model(prompt).logits[0, -1].softmax(-1)[target]
        assert row["p_zero_shot"] == pytest.approx(float(base), rel=1e-4)
        assert row["p_fv"] == pytest.approx(float(edited), rel=1e-4)
    assert document["p"]["fv"] == pytest.approx(sum(row["p_fv"] for row in document["queries"]) / document["n_queries"])


def test_the_layer_is_the_one_that_was_chosen_on_others_not_the_best_of_these() -> None:
    def scores(p: list[list[float]] | list[float]) -> TokenScores:
        logprob = torch.tensor(p).log()
        return TokenScores(logit=logprob, logprob=logprob, top_id=torch.zeros_like(logprob, dtype=torch.int64))

    n = 12
    prompts = Prompts([[1, 2]] * n, [0] * n, range(n), [[0]] * n)
    effects = Effects(base=scores([0.1] * n), edited=scores([[0.8, 0.3]] * n))
    numbers = numbers_of(prompts, Injections(effects, noticeable=False), scores([0.9] * n), layer=1)
    assert numbers["p"] == pytest.approx({"zero_shot": 0.1, "fv": 0.3, "clean": 0.9})
    assert numbers["share_of_gap"]["value"] == pytest.approx(0.25)
    assert numbers["per_layer"]["0"]["mean_p"] == pytest.approx(0.8)
    assert "at layer 1, chosen on others" in verdict_of(numbers, n, 1)
