"""The vector on an untouched transformers model is what relfv's own stages measured, in every way a model is run."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import relfv
from parity import assert_close, largest, rounding
from relfv.api.applying import Frame, adding
from relfv.engine.answers import Injection, score_answers
from zoo import ZOO, backbone_of

FAMILIES = {animal.family: animal for animal in reversed(list(ZOO.values()))}
NO_FRAME = Frame((), ())


def rows_of(run: relfv.Run) -> list[dict[str, Any]]:
    return json.loads((run["Q15"].artifacts / "step6/answers.json").read_text())["rows"]


@pytest.fixture
def fv(demo_run: relfv.Run) -> relfv.FunctionVector:
    return demo_run["Q15"].function_vector


@pytest.mark.parametrize("use_cache", [True, False])
def test_generate_writes_what_answers_json_has(
    demo_run: relfv.Run, fv: relfv.FunctionVector, demo_model: Any, demo_tokenizer: Any, use_cache: bool
) -> None:
    rows = rows_of(demo_run)
    prompts = fv.prompt([row["query"] for row in rows], demo_tokenizer)
    width = prompts["input_ids"].shape[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error", relfv.UsageWarning)
        with fv.apply(demo_model, where="generated"):
            written = demo_model.generate(**prompts, max_new_tokens=2, do_sample=False, use_cache=use_cache)
    assert [demo_tokenizer.decode(ids[width:]) for ids in written] == [row["written_with"] for row in rows]
    assert any(row["written_with"] != row["written_base"] for row in rows)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(
    demo_run: relfv.Run, fv: relfv.FunctionVector, demo_model: Any, demo_tokenizer: Any, side: str
) -> None:
    rows = rows_of(demo_run)
    texts = [f"Q: {row['query']}\nA:" for row in rows] + ["Q: one\nA: two\n\nQ: four\nA:"]
    demo_tokenizer.pad_token, demo_tokenizer.padding_side = demo_tokenizer.decode([0]), side
    batch = demo_tokenizer(texts, padding=True, return_tensors="pt")
    assert 0 in batch["attention_mask"]
    with fv.apply(demo_model), torch.no_grad():
        logits = demo_model(**batch).logits
    for row, its, mask in zip(rows, logits, batch["attention_mask"], strict=False):
        p = its[mask.nonzero()[-1, 0]].softmax(-1)
        for top in row["top_with"]:
            assert p[top["token_id"]] == pytest.approx(top["p"], abs=rounding(largest(its)))


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_model_of_every_family_scores_whole_answers_as_the_engine_does(family: str) -> None:
    """Prompts of different lengths on the left of a batch, then the answer token by token over the cache."""
    backbone = backbone_of(FAMILIES[family].build)
    model, layer, generator = backbone.model, 1, torch.Generator().manual_seed(5)
    prompts = [torch.randint(1, 290, (length,), generator=generator).tolist() for length in (5, 9)]
    answers = [torch.randint(1, 290, (3,), generator=generator).tolist() for _ in prompts]
    vector = 2.0 * torch.randn(backbone.arch.resid_dim, generator=generator)
    expected = score_answers(backbone, prompts, answers, Injection(layer, vector))
    without = score_answers(backbone, prompts, answers)
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    takes = backbone.takes_position_ids()
    total, scale = torch.zeros(len(prompts)), 1.0
    with adding(model, layer, vector, "generated", NO_FRAME), torch.no_grad():
        out = model(
            input_ids=ids, attention_mask=mask, use_cache=True, **({"position_ids": positions} if takes else {})
        )
        for i, token in enumerate(zip(*answers, strict=True)):
            logits = out.logits[:, -1]
            scale = max(scale, largest(logits))
            total += logits.log_softmax(-1)[range(len(prompts)), list(token)]
            mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=mask.dtype)], dim=1)
            at = {"position_ids": (mask.sum(-1, keepdim=True) - 1)} if takes else {}
            if i + 1 < len(answers[0]):
                out = model(
                    input_ids=torch.tensor(token)[:, None], attention_mask=mask, use_cache=True,
                    past_key_values=out.past_key_values, **at,
                )  # fmt: skip
    assert_close(total, torch.tensor([one.logprob for one in expected]), 3 * scale)
    assert max(abs(a.logprob - b.logprob) for a, b in zip(expected, without, strict=True)) > 0.1


def test_by_default_only_the_last_token_of_the_prompt_is_changed(
    fv: relfv.FunctionVector, demo_model: Any, demo_tokenizer: Any
) -> None:
    prompt, block = fv.prompt("two", demo_tokenizer), demo_model.model.layers[fv.layer]
    seen: list[torch.Tensor] = []
    with torch.no_grad():
        with fv.apply(demo_model):
            handle = block.register_forward_hook(lambda _, __, out: seen.append(out))  # after the vector's
            demo_model.generate(**prompt, max_new_tokens=3, do_sample=False)
            handle.remove()
        plain = demo_model(**prompt, output_hidden_states=True).hidden_states[fv.layer + 1]
    added = seen[0] - plain
    assert_close(added[0, -1], torch.from_numpy(fv.alpha * fv.vector), largest(plain))
    assert largest(added[0, :-1]) == 0
    assert len(seen) == 3


def test_a_prompt_that_begins_like_the_one_before_is_one_of_its_own(
    fv: relfv.FunctionVector, demo_model: Any, demo_tokenizer: Any
) -> None:
    """Two calls, the second a token longer: no ``generate()`` without a cache."""
    first, second = (demo_tokenizer(text, return_tensors="pt") for text in ("Q: two\nA", "Q: two\nA:"))
    assert second["input_ids"][:, :-1].equal(first["input_ids"])
    with torch.no_grad():
        with fv.apply(demo_model):
            alone = demo_model(**second).logits
        with fv.apply(demo_model):
            with pytest.warns(relfv.UsageWarning):
                demo_model(**first)
            after_another = demo_model(**second).logits
    assert_close(after_another, alone, largest(alone))


def test_generate_without_a_cache_knows_a_longer_prompt_from_the_one_before(
    fv: relfv.FunctionVector, demo_model: Any, demo_tokenizer: Any
) -> None:
    first, second = (
        demo_tokenizer(text, return_tensors="pt") for text in ("Q: two\nA:", "Q: two\nA: ten\n\nQ: six\nA:")
    )
    assert second["input_ids"][:, : first["input_ids"].shape[1]].equal(first["input_ids"])
    assert second["input_ids"].shape[1] > first["input_ids"].shape[1] + 3
    how = {"max_new_tokens": 2, "do_sample": False, "use_cache": False, "output_logits": True}

    def last_logits(*prompts: Any) -> torch.Tensor:
        with fv.apply(demo_model):
            return [demo_model.generate(**prompt, **how, return_dict_in_generate=True) for prompt in prompts][
                -1
            ].logits[0]

    alone = last_logits(second)
    assert_close(last_logits(first, second), alone, largest(alone))
    without = demo_model.generate(**second, **how, return_dict_in_generate=True).logits[0]
    assert (alone - without).abs().max() > 0.1


def hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_hooks_are_gone_after_an_exception(fv: relfv.FunctionVector, demo_model: Any) -> None:
    class Stop(Exception):
        pass

    def stop() -> None:
        with fv.apply(demo_model):
            assert hooks(demo_model)
            raise Stop

    with pytest.raises(Stop):
        stop()
    assert not hooks(demo_model)


def test_a_with_block_in_which_nothing_ran_is_an_error(
    fv: relfv.FunctionVector, demo_model: Any, demo_tokenizer: Any, llama_path: Path
) -> None:
    with pytest.raises(relfv.RunError, match="nothing was added"), fv.apply(demo_model):
        pass
    assert not hooks(demo_model)


def test_what_cannot_be_followed_is_refused(fv: relfv.FunctionVector, demo_model: Any, demo_tokenizer: Any) -> None:
    demo_tokenizer.pad_token, demo_tokenizer.padding_side = demo_tokenizer.decode([0]), "right"
    batch = demo_tokenizer(["Q: two\nA:", "Q: one\nA: two\n\nQ: four\nA:"], padding=True, return_tensors="pt")
    with pytest.raises(relfv.InputError, match="padded on the right"), fv.apply(demo_model):
        demo_model.generate(**batch, max_new_tokens=1)
    prompt = fv.prompt("two", demo_tokenizer)["input_ids"]
    past = demo_model(input_ids=prompt[:, :3], use_cache=True).past_key_values
    with pytest.raises(relfv.InputError, match="over a cache of 3"), fv.apply(demo_model):
        demo_model(input_ids=prompt[:, 3:], past_key_values=past)
    with pytest.raises(relfv.InputError, match="ran by itself"), fv.apply(demo_model):
        demo_model.model.layers[fv.layer](torch.zeros(1, 1, 128), position_embeddings=(torch.zeros(1, 1, 16),) * 2)
    with pytest.raises(relfv.InputError, match="layers 0 to 7"), fv.apply(demo_model, layer=8):
        pass
    with pytest.raises(relfv.InputError, match="expected 'last' or 'generated'"), fv.apply(demo_model, where="all"):  # type: ignore[arg-type]
        pass
    assert not hooks(demo_model)


def test_another_width_is_refused_and_another_model_warned_of(
    fv: relfv.FunctionVector, demo_model: Any, demo_tokenizer: Any, llama_path: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    other = AutoModelForCausalLM.from_pretrained(llama_path)
    warned = pytest.warns(relfv.UsageWarning, match="another model")
    refused = pytest.raises(relfv.InputError, match="128 dimensions and the residual stream of LlamaForCausalLM 48")
    with warned, refused, fv.apply(other):
        pass
    demo_model.model.layers[0].mlp.up_proj.weight.data *= 2
    demo_model.save_pretrained(tmp_path / "tuned")
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    with pytest.warns(relfv.UsageWarning, match="another model: folder-sha256"), fv.apply(tuned):
        tuned(**fv.prompt("two", demo_tokenizer))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Q: two\nA: ", "something after that, such as a space"),
        ("Q: two", "ends in the token ids"),
        ("two\nA:", "begins with the token ids"),
    ],
)
def test_a_prompt_that_is_not_relfvs_is_warned_of(
    fv: relfv.FunctionVector, demo_model: Any, demo_tokenizer: Any, text: str, said: str
) -> None:
    with pytest.warns(relfv.UsageWarning, match=said), fv.apply(demo_model):
        demo_model(**demo_tokenizer(text, return_tensors="pt"))


def test_bos_twice_is_warned_of(fv: relfv.FunctionVector, demo_model: Any, demo_tokenizer: Any) -> None:
    ids = fv.prompt("two", demo_tokenizer)["input_ids"]
    twice = torch.cat([ids[:, :1], ids], dim=1)
    with pytest.warns(relfv.UsageWarning, match="is BOS there twice"), fv.apply(demo_model):
        demo_model(input_ids=twice)


def test_a_prompt_is_fed_as_the_stages_feed_it(
    demo_run: relfv.Run, fv: relfv.FunctionVector, demo_tokenizer: Any
) -> None:
    from relfv.models.tokens import Tokens

    tokens = Tokens(demo_tokenizer)
    for row in rows_of(demo_run):
        one = fv.prompt(row["query"], demo_tokenizer)
        assert one["input_ids"].tolist() == [tokens.encode(f"Q: {row['query']}\nA: ")]
        assert one["attention_mask"].min() == 1
    for word in (" two", "two ", "", "Q: two\nA:", [2], []):
        with pytest.raises(relfv.InputError):
            fv.prompt(word, demo_tokenizer)  # type: ignore[arg-type]
    with pytest.raises(relfv.InputError, match="special token"):
        fv.prompt(demo_tokenizer.decode([0]), demo_tokenizer)


def test_the_space_before_an_answer_is_fed_where_it_is_a_token_of_its_own(
    fv: relfv.FunctionVector, demo_tokenizer: Any
) -> None:
    spaced = replace(fv, metadata={**fv.metadata, "space_ids": json.dumps({"": [222], "two": []})})
    plain = fv.prompt("ten", demo_tokenizer)["input_ids"].tolist()[0]
    assert spaced.prompt("ten", demo_tokenizer)["input_ids"].tolist() == [[*plain, 222]]
    assert spaced.prompt("two", demo_tokenizer)["input_ids"].equal(fv.prompt("two", demo_tokenizer)["input_ids"])


def test_the_parts_sum_to_the_vector_and_layer_and_alpha_can_be_chosen(fv: relfv.FunctionVector) -> None:
    total = np.sum([part.astype(np.float64) for part in fv.by_layer.values()], axis=0)
    assert np.abs(total - fv.vector).max() <= rounding(float(np.abs(fv.vector).max()))
    assert set(fv.by_layer) == {head.layer for head in fv.heads}
    assert (fv.at(layer=3).layer, fv.at(alpha=2).alpha, fv.at().layer) == (3, 2, fv.layer)
