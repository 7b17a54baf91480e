"""The flags of every setting: which commands have them, what the environment says where they are not given."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from relfv.commands.flags import add_setting, settings_from
from relfv.errors import InputError
from relfv.settings import FLAGS, SPEC_CSV, Settings

# TECH_SPEC_RELATION_QWISE, section 2: the variable of each setting, and a value that is not the default.
VARIABLES: dict[str, tuple[str, str, Any]] = {
    "model": ("MODEL", "demo", "demo"),
    "model_spec": ("MODEL_SPEC", "gpt2", "gpt2"),
    "device": ("DEVICE", "cpu", "cpu"),
    "dtype": ("DTYPE", "bf16", "bfloat16"),
    "quant": ("QUANT", "8bit", "8bit"),
    "seed": ("SEED", "7", 7),
    "relation_csv_path": ("RELATION_CSV", "mine.csv", "mine.csv"),
    "n_trials_per_q": ("N_TRIALS_PER_Q", "3", 3),
    "n_demos": ("N_DEMOS", "2", 2),
    "score_key": ("SCORE_KEY", "mean_delta_logit", "mean_delta_logit"),
    "topk": ("TOPK", "5", 5),
    "alpha": ("ALPHA", "0.5", 0.5),
    "n_eval": ("N_EVAL", "4", 4),
}


def parsed(command: str, *argv: str) -> Settings:
    parser = argparse.ArgumentParser()
    for field, flag in FLAGS.items():
        if command in flag.commands:
            add_setting(parser, field, flag, flag.names.get(command, f"--{field}"))
    parser.set_defaults(command_name=command)
    return settings_from(parser.parse_args(argv))


@pytest.mark.parametrize("field", VARIABLES)
def test_every_variable_of_the_spec_stands_for_its_flag_and_the_flag_wins(
    field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    variable, text, value = VARIABLES[field]
    monkeypatch.setenv(variable, text)
    assert getattr(parsed("run"), field) == value
    given = str(getattr(Settings(), field))
    assert getattr(parsed("run", f"--{field}", given), field) == getattr(Settings(), field)


def test_the_specs_family_is_that_of_the_specs_model_and_another_models_is_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert parsed("run").model_spec == "llama3"
    assert parsed("run", "--model", "demo").model_spec == "auto"
    assert parsed("run", "--model", "demo", "--model_spec", "llama").model_spec == "llama"
    monkeypatch.setenv("MODEL", "demo")
    assert parsed("run").model_spec == "auto"
    monkeypatch.setenv("MODEL_SPEC", "gpt2")
    assert parsed("run").model_spec == "gpt2"


def test_a_command_without_the_flag_does_not_ask_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEED", "7")
    assert parsed("stepd").seed == 7
    assert parsed("stepe").seed == 0


def test_a_variable_that_is_no_number_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("N_EVAL", "many")
    with pytest.raises(InputError, match=r"\$N_EVAL 'many': expected a number"):
        parsed("run")


def test_what_the_spec_fixes_and_is_chosen_otherwise_is_a_departure_and_the_same_csv_elsewhere_is_none() -> None:
    assert Settings(relation_csv_path=f"../elsewhere/{SPEC_CSV}", device="cuda", dtype="bfloat16").departures() == []
    other: dict[str, Any] = {
        "model": "demo", "model_spec": "auto", "seed": 1, "n_trials_per_q": 5, "n_demos": 2, "corruption": "shuffle",
        "layers": "0", "heads": "1", "score_key": "mean_delta_logit", "topk": 3, "alpha": 2.0, "n_eval": 7,
        "allow_query_duplicates": True, "relation_csv_path": "mine.csv",
    }  # fmt: skip
    departures = Settings(**other).departures()
    assert [departure.split()[0] for departure in departures if "csv" not in departure] == [
        name for name in FLAGS if name in other and name != "relation_csv_path"
    ]
    assert f"relation_csv_path is mine.csv, the spec fixes {SPEC_CSV}" in departures
