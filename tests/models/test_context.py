"""How long a prompt a model takes, and what becomes of a q_id whose prompts are longer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from conftest import llama, scale_up
from folders import arguments, contents, status
from relfv.cli import main
from relfv.models.context import context_of

LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
LONG_ROPE = {"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    ("config", "changes", "limit", "marks"),
    [
        ("GPT2Config", {}, 1024, []),
        ("GPTJConfig", {}, 2048, []),
        ("OPTConfig", {}, 2048, []),
        ("LlamaConfig", {}, 2048, []),
        ("BloomConfig", {}, None, []),
        ("FalconConfig", {}, 2048, []),
        ("FalconConfig", {"alibi": True}, None, []),
        ("MptConfig", {}, 2048, []),
        ("MistralConfig", {}, 131072, [4096]),
        ("Qwen2Config", {}, 32768, []),
        ("Gemma2Config", {}, 8192, [4096]),
        ("GPTNeoConfig", {}, 2048, [256]),
        ("LlamaConfig", {"max_position_embeddings": 131072, "rope_scaling": LLAMA3_ROPE}, 131072, [8192]),
        ("LlamaConfig", {"max_position_embeddings": 4096, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 16384, [4096]),  # noqa: E501
        ("Qwen2Config", {"max_position_embeddings": 32768, "rope_scaling": YARN}, 131072, [32768]),
        ("Phi3Config", {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "rope_scaling": LONG_ROPE}, 131072, [4096]),  # noqa: E501
    ],
)  # fmt: skip
def test_the_limit_is_the_models_own(config: str, changes: dict[str, Any], limit: int | None, marks: list[int]) -> None:
    context = context_of(getattr(transformers, config)(**changes))
    assert context.limit == limit
    assert [length for length, _ in context.marks] == marks
    assert [bool(context.notes(length)) for length, _ in context.marks] == [False] * len(marks)
    assert all(context.notes(length + 1) for length in marks)


def gpt2(n_positions: int) -> Any:
    shape = {"vocab_size": 420, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": n_positions}
    return scale_up(transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)))


SHORT, LONG = ["--n_demos", "1", "--topk", "2"], ["--n_demos", "9", "--topk", "2"]


@pytest.mark.parametrize(
    "model", [lambda: gpt2(48), lambda: llama(max_position_embeddings=48)], ids=["learned", "rotary"]
)
def test_prompts_that_do_not_fit_skip_their_q_id_before_anything_is_computed(
    model: Callable[[], Any], save_model: Callable[..., Path], csv_path: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The self-check's own prompts are longer than 48 tokens, too: the model opens all the same."""
    path = save_model(model())
    run = arguments(path, csv_path, tmp_path, "--model_spec", "auto", "--q_list", "A1,B2")
    assert main([*run, *LONG]) == 0
    for q_id in ("A1", "B2"):
        found = status(tmp_path / "pairs", q_id)
        assert found["status"] == "skipped"
        assert "tokens, and the model has positions for 48" in found["reason"]
        assert contents(tmp_path / "pairs" / q_id / "artifacts") == {}
    assert main(["verify", str(tmp_path)]) == 0
    capsys.readouterr()
    assert main([*run, *LONG]) == 0
    said = capsys.readouterr().err
    assert "2 skipped" in said
    assert "opened" not in said
    assert main([*run, *SHORT]) == 0
    assert status(tmp_path / "pairs", "A1")["status"] == "completed"


def test_one_command_at_a_time_it_is_skipped_and_foreign_trials_are_refused(
    save_model: Callable[..., Path], llama_path: Path, finished: Path, csv_path: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = str(save_model(gpt2(48)))
    model = ["--model", path, "--model_spec", "auto"]
    step_d = ["stepd", *model, "--relation_csv_path", str(csv_path), "--relation_q_list", "A1"]
    assert main([*step_d, "--out_base_dir", str(tmp_path / "A1")]) == 0
    assert "skipped: prompt and answer have up to" in capsys.readouterr().err
    assert status(tmp_path, "A1")["status"] == "skipped"
    there = finished / "A1/artifacts"
    step_e = ["stepe", *model, "--stepd_artifacts_dir", str(there), "--sampled_trials_path"]
    assert main([*step_e, str(there / "sampled_trials.json"), "--out_dir", str(tmp_path / "e"), "--k", "2"]) == 2
    assert "the model has positions for 48" in capsys.readouterr().err


def test_prompts_beyond_a_sliding_window_run_with_a_word_of_it(
    save_model: Callable[..., Path], csv_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = {"vocab_size": 420, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    config = transformers.MistralConfig(**shape, num_attention_heads=4, num_key_value_heads=2, sliding_window=40)
    path = save_model(scale_up(transformers.MistralForCausalLM(config)))
    more = ["--model_spec", "auto", "--q_list", "A1", *LONG]
    assert main(arguments(path, csv_path, tmp_path, *more)) == 0
    assert "more than the 40 that its sliding-window layers see" in capsys.readouterr().err
    meta = json.loads((tmp_path / "pairs/A1/artifacts/sampled_trials.json").read_text())["meta"]
    assert meta["longest_prompt_tokens"] > 40
    assert "more than the 40" in meta["context_notes"][0]
