"""The single steps against plain hooks on the user's own model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import relfv
from conftest import llama, make_tokenizer
from parity import assert_close, rounding

PROMPTS = ["Q: dog\nA: cub\n\nQ: cat\nA:", "Q: cow\nA: "]
CLEAN = ["Q: dog\nA: puppy\n\nQ: cat\nA:", "Q: owl\nA: owlet\n\nQ: cow\nA:"]


@pytest.fixture(scope="module")
def opened() -> Any:
    return relfv.open_model(llama(), make_tokenizer())


def naive(
    opened: Any, prompt: str, hook: tuple[torch.nn.Module, Any] | None = None, *, before: bool = False
) -> torch.Tensor:
    """Log-probabilities after the prompt without its trailing space, by one plain forward pass."""
    model, ids = opened.backbone.model, opened.tokens.tokenizer(prompt.removesuffix(" "), return_tensors="pt").input_ids
    handle = None
    if hook:
        register = "register_forward_pre_hook" if before else "register_forward_hook"
        handle = getattr(hook[0], register)(hook[1])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, -1]
    if handle:
        handle.remove()
    return logits.log_softmax(-1)


def setting(head: int, value: np.ndarray) -> Any:
    def hook(_: Any, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        new = args[0].clone()
        new[:, -1, head * len(value) : (head + 1) * len(value)] = torch.from_numpy(value)
        return (new,)

    return hook


def adding(vector: np.ndarray) -> Any:
    def hook(_: Any, __: Any, out: torch.Tensor) -> torch.Tensor:
        new = out.clone()
        new[:, -1] += torch.from_numpy(vector)
        return new

    return hook


@pytest.mark.parametrize("per_prompt", [False, True])
def test_every_heads_effect_on_custom_prompts_and_several_targets(opened: Any, per_prompt: bool) -> None:
    targets = [["kitten", 7, "paris"], [300, "calf", 5]]
    means = [relfv.mean_activations(opened, [text]) for text in CLEAN]
    replacement = 3 * np.stack(means) if per_prompt else 3 * relfv.mean_activations(opened, CLEAN)
    effects = relfv.head_effects(opened, PROMPTS, targets, replacement)
    assert effects.edited["p"].shape == (2, 3, 3, 8)
    assert effects.targets[0, 1] == 7
    blocks, largest_effect = opened.backbone.model.model.layers, 0.0
    for n, prompt in enumerate(PROMPTS):
        base = naive(opened, prompt)
        for layer in range(3):
            for head in range(8):
                value = (replacement[n] if per_prompt else replacement)[layer, head]
                found = naive(opened, prompt, (blocks[layer].self_attn.o_proj, setting(head, value)), before=True)
                for i, target in enumerate(effects.targets[n]):
                    true = float(found[target] - base[target])
                    limit = rounding(max(abs(float(found[target])), 40.0))
                    assert effects.delta("logprob")[n, i, layer, head] == pytest.approx(true, abs=limit)
                    largest_effect = max(largest_effect, abs(true))
    assert largest_effect > 0.2


def test_vectors_after_every_layer(opened: Any) -> None:
    vectors = 2 * np.random.default_rng(0).standard_normal((2, 48)).astype(np.float32)
    effects = relfv.inject(opened, PROMPTS, ["kitten", "calf"], vectors)
    assert effects.delta().shape == (2, 3, 2)
    blocks = opened.backbone.model.model.layers
    for n, prompt in enumerate(PROMPTS):
        base, target = naive(opened, prompt), effects.targets[n]
        for layer in range(3):
            for v, vector in enumerate(vectors):
                found = naive(opened, prompt, (blocks[layer], adding(vector)))
                true, limit = float(found[target] - base[target]), rounding(max(abs(float(found[target])), 40.0))
                assert effects.delta("logprob")[n, layer, v] == pytest.approx(true, abs=limit)
    one = relfv.inject(opened, PROMPTS, ["kitten", "calf"], vectors[1], layers=[2, 0])
    assert one.delta("logprob") == pytest.approx(effects.delta("logprob")[:, [0, 2], 1], abs=rounding(40.0))


def test_some_heads_leave_the_others_unknown(opened: Any) -> None:
    values = relfv.mean_activations(opened, CLEAN)
    effects = relfv.head_effects(opened, PROMPTS, ["kitten", "calf"], values, heads=np.array([(2, 1), (0, 3)]))
    known = np.argwhere(~np.isnan(effects.delta()[0])).tolist()
    assert known == [[0, 3], [2, 1]]


def test_means_are_of_the_token_that_is_patched_where_an_answer_begins_with_white_space() -> None:
    """The demo tokenizer makes a token of the space before this answer alone."""
    opened, prompt, answer = relfv.open_model("demo"), "Q: japan\nA: tokyo\n\nQ: mongolia\nA:", "ulaanbaatar"
    fed = [*opened.tokens.encode(prompt), *opened.tokens.target(prompt, answer).space_ids]
    means = relfv.mean_activations(opened, [prompt], [answer])
    assert_close(torch.from_numpy(means), torch.from_numpy(relfv.mean_activations(opened, [fed])), 10.0)
    assert np.abs(relfv.mean_activations(opened, [prompt]) - means).max() > 0.01
    with pytest.warns(
        relfv.UsageWarning, match="1 of 1 answers begin with white space .* means fit if they were taken"
    ):
        effects = relfv.head_effects(opened, [prompt], [answer], means)
    assert np.abs(effects.delta("logprob")).max() < rounding(40.0)  # a head's own z in its place


def test_the_model_that_was_given_is_left_as_it_was() -> None:
    model = llama().train()
    opened = relfv.open_model(model, make_tokenizer(), precision="exact")
    relfv.inject(opened, PROMPTS, ["kitten", "calf"], np.ones(48, dtype=np.float32))
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_does_not_fit_is_refused_in_one_line(opened: Any) -> None:
    values, vector = relfv.mean_activations(opened, CLEAN), np.ones(48, dtype=np.float32)
    refused = {
        "2 prompts and 1 targets": lambda: relfv.inject(opened, PROMPTS, ["kitten"], vector),
        "as many for every prompt": lambda: relfv.inject(opened, PROMPTS, [["kitten"], [1, 2]], vector),
        r"replacement has shape \(3, 8\)": lambda: relfv.head_effects(opened, PROMPTS, [1, 2], values[:, :, 0]),
        r"vectors have shape \(47,\)": lambda: relfv.inject(opened, PROMPTS, [1, 2], vector[1:]),
        "layers 0 to 2": lambda: relfv.inject(opened, PROMPTS, [1, 2], vector, layers=[3]),
        r"heads: \(3, 0\) is no head": lambda: relfv.head_effects(opened, PROMPTS, [1, 2], values, heads=[(3, 0)]),
        "depends on the prompt's text": lambda: relfv.inject(opened, [[1, 2]], ["kitten"], vector),
        "gives no token": lambda: relfv.inject(opened, [[]], [1], vector),
        "prompts are 'Q: dog": lambda: relfv.mean_activations(opened, CLEAN[0]),
        "2 prompts and 1 targets; expected": lambda: relfv.mean_activations(opened, CLEAN, ["kitten"]),
        "0 prompts and 0 targets": lambda: relfv.mean_activations(opened, []),
        "token id 999999: expected one that the model knows": lambda: relfv.mean_activations(opened, [[999999]]),
        "token id -1": lambda: relfv.inject(opened, PROMPTS, [1, -1], vector),
        "target True": lambda: relfv.inject(opened, PROMPTS, [1, True], vector),
        "vectors holds NaN": lambda: relfv.inject(opened, PROMPTS, [1, 2], vector * np.nan),
        "replacement holds NaN": lambda: relfv.head_effects(opened, PROMPTS, [1, 2], values * np.nan),
        "replacement: .*expected an array": lambda: relfv.head_effects(opened, PROMPTS, [1, 2], [[1, 2], [3]]),
        r"heads: \(1, 2, 3\) is no head": lambda: relfv.head_effects(
            opened, PROMPTS, [1, 2], values, heads=[(1, 2, 3)]
        ),
        r"layers \[1.5\]": lambda: relfv.inject(opened, PROMPTS, [1, 2], vector, layers=[1.5]),
        "for every prompt": lambda: relfv.inject(opened, PROMPTS, [1, [2]], vector),
        "measure 'prob': expected one of": lambda: relfv.inject(opened, PROMPTS, [1, 2], vector).delta("prob"),
        "positions": lambda: relfv.mean_activations(opened, [[1] * 5000]),
        r"heads: \(3,\) is no head": lambda: relfv.head_effects(opened, CLEAN, [1, 2], values, heads=[3]),
        r"layers \['a', 1\]": lambda: relfv.inject(opened, PROMPTS, [1, 2], vector, layers=["a", 1]),
        "target 3.7": lambda: relfv.inject(opened, PROMPTS, [1, 3.7], vector),
        "targets are 'None'": lambda: relfv.inject(opened, PROMPTS, None, vector),
        r"target \['a', 'b'\]: expected an answer": lambda: relfv.mean_activations(
            opened, PROMPTS, [["a", "b"], ["c", "d"]]
        ),
        "model is None": lambda: relfv.open_model(None),
        "topk=...: is no setting here": lambda: relfv.open_model("demo", topk=2),
    }
    for said, call in refused.items():
        with pytest.raises(relfv.InputError, match=said):
            call()
