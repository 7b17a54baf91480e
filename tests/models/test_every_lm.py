"""Every causal language model of the installed transformers: measured right, or refused in one line."""

from __future__ import annotations

import pytest
import transformers as tf

from every_lm import MODEL_TYPES
from families_page import EVERY_MODEL, PAGE
from outcomes import outcome

HEAD = """{version}

Each `model_type` that `AutoModelForCausalLM` knows, as a tiny random model of 4 layers (in hybrids the second and the
last have attention, where their config lets one choose). What its engine measures for every head with attention and
after every layer, and the clean means, agreed with hooks on the model's own forward pass, written apart from relfv's;
or opening ended in the line that is quoted. `not tried` says why there is no tiny model. In hybrids, heads are measured
where there is attention, and vectors are injected after every layer.

| `model_type` | Engine, or why not |
| --- | --- |
"""

QUICK = (
    "deepseek_v2", "gemma3n_text", "jamba", "kimi_linear", "lfm2", "mamba", "minicpm3", "openai-gpt", "qwen3_next",
    "recurrent_gemma", "roberta", "zamba2",
)  # fmt: skip
"""Families that once opened wrongly or fell over, one of a kind."""


@pytest.mark.parametrize(
    "model_type", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in MODEL_TYPES]
)
def test_a_causal_model_is_measured_as_plain_hooks_measure_it_or_refused_in_one_line(model_type: str) -> None:
    found = outcome(model_type)
    if found.not_built:
        pytest.skip(f"transformers gives no small {model_type}: {found.not_built}")
    if found.refusal:
        assert "\n" not in found.refusal
        says = ("expected", "cannot be measured correctly", "would be wrong")
        assert any(words in found.refusal for words in says)
        return
    assert found.gap <= found.limit < 1e-3
    assert found.effect > 0.01
    assert found.has_layers_in_names  # or a good checkpoint would be refused by its names


HYBRIDS = (
    "bailing_hybrid", "bamba", "granitemoehybrid", "jamba", "kimi_linear", "lfm2", "lfm2_moe", "minimax", "olmo_hybrid",
    "qwen3_5_text", "qwen3_next", "recurrent_gemma", "zamba", "zamba2",
)  # fmt: skip


@pytest.mark.parametrize(
    "model_type", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in HYBRIDS]
)
def test_a_hybrid_is_swept_in_its_layers_with_attention(model_type: str) -> None:
    """In every second layer of these models is attention; the others have linear attention, recurrence, convolution."""
    if model_type not in MODEL_TYPES:
        pytest.skip("not in this release of transformers")
    assert (outcome(model_type).layers, outcome(model_type).depth) == ((1, 3), 4)


@pytest.mark.parametrize("model_type", ["deepseek_v2", "minicpm3", "openai-gpt"])
def test_latent_attention_and_blocks_that_return_lists_are_measured(model_type: str) -> None:
    assert outcome(model_type).engine == "reference"


def test_several_residual_streams_are_refused() -> None:
    assert "passes on (4, 1, 23, 48), expected one residual stream" in outcome("gemma3n_text").refusal


def test_a_model_without_attention_is_refused() -> None:
    assert "none of its 4 layers has an attention output projection" in outcome("mamba").refusal


@pytest.mark.slow
def test_the_pages_table_of_every_model_is_what_was_found(request: pytest.FixtureRequest) -> None:
    """Of the release of transformers that the page names; the outcomes are those of the tests above."""
    first, _, there = PAGE.read_text(encoding="utf-8").partition(EVERY_MODEL)
    writing = request.config.getoption("--write-families")
    if not writing and not there.startswith(f"{tf.__version__}\n"):
        pytest.skip("the page was written with another release of transformers")
    rows = [f"| `{name}` | {outcome(name).words.replace('|', '/')} |\n" for name in MODEL_TYPES]
    table = HEAD.format(version=tf.__version__) + "".join(rows)
    if writing:
        PAGE.write_text(first + EVERY_MODEL + table, encoding="utf-8")
    else:
        assert there == table
