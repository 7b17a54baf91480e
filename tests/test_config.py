from __future__ import annotations

import pytest

from relfv.errors import InputError
from relfv.settings import Settings, fingerprint, fingerprint_fields, parse_index_list


def test_the_defaults_are_the_specs_and_conform() -> None:
    settings = Settings()
    assert settings.departures() == []
    assert (settings.model, settings.model_spec, settings.seed) == ("meta-llama/Llama-3.1-8B", "llama3", 0)
    assert (settings.n_trials_per_q, settings.n_demos, settings.topk, settings.n_eval) == (25, 9, 20, 50)
    assert (settings.score_key, settings.alpha) == ("mean_delta_p", 1.0)


def test_settings_survive_json_and_ignore_keys_of_other_versions() -> None:
    settings = Settings(topk=5, alpha=0.5)
    assert Settings.from_json({**settings.to_json(), "of_the_future": 1}) == settings


def prints(settings: Settings, rows: str = "r", model: str = "m") -> str:
    return fingerprint(fingerprint_fields(settings, rows_sha256=rows, model_identity=model))


def test_the_fingerprint_follows_what_the_numbers_depend_on_and_nothing_else() -> None:
    same = prints(Settings())
    assert prints(Settings(device="cpu", model="/elsewhere", relation_csv_path="moved.csv")) == same
    for other in (Settings(seed=1), Settings(alpha=2.0), Settings(precision="fast"), Settings(corruption="shuffle")):
        assert prints(other) != same
    assert prints(Settings(), rows="other") != same
    assert prints(Settings(), model="other") != same


@pytest.mark.parametrize(
    ("text", "indices"), [("all", [0, 1, 2, 3, 4]), ("0-2,4", [0, 1, 2, 4]), (" 3 ", [3]), ("1,0-1", [0, 1])]
)
def test_index_lists(text: str, indices: list[int]) -> None:
    assert parse_index_list(text, 5, "--layers") == indices


@pytest.mark.parametrize("text", ["5", "", "0-", "a-b", "1-0", "0-5"])
def test_index_lists_that_make_no_sense_name_the_flag(text: str) -> None:
    with pytest.raises(InputError, match="--layers"):
        parse_index_list(text, 5, "--layers")
