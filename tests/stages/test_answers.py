from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import WORDS, make_tokenizer
from folders import arguments
from relfv.cli import main


def that_always_answers(answer: str) -> LlamaForCausalLM:
    """A model that goes on by its last token alone: ``A:`` with the answer and a line break. Its heads do little."""
    encode, line_break = make_tokenizer().encode, make_tokenizer().encode("\n")[-1]
    n, following = len(make_tokenizer()), dict.fromkeys(range(len(make_tokenizer())), line_break)
    prompt = encode("Q: x\nA:")
    following |= dict(pairwise([prompt[-1], *encode(f"Q: x\nA: {answer}")[len(prompt) :], line_break]))
    shape = {"vocab_size": n, "hidden_size": n, "intermediate_size": 8, "num_hidden_layers": 2, "head_dim": 8}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=4))
    model.model.embed_tokens.weight.data = torch.eye(n)
    model.lm_head.weight.data = torch.zeros(n, n)
    for token, after in following.items():
        model.lm_head.weight.data[after, token] = 0.5
    for block in model.model.layers:
        block.mlp.down_proj.weight.data.zero_()
        block.self_attn.o_proj.weight.data *= 0.05
    return model.eval()


def test_a_whole_answer_is_seen_to_end_and_any_right_one_counts(
    save_model: Callable[..., Path], tmp_path: Path
) -> None:
    path = tmp_path / "pups.csv"
    pairs = [*WORDS, ("dog", "pup")]
    path.write_text("id,ex_A,ex_B\n" + "".join(f"Q1,{word},{answer}\n" for word, answer in pairs))
    model = save_model(that_always_answers("puppy"))
    assert main(arguments(model, path, tmp_path, "--n_trials_per_q", "60", "--topk", "2")) == 0
    answers = json.loads((tmp_path / "pups/Q1/artifacts/step6/answers.json").read_text())
    rows = {(row["query"], row["answer"]): row for row in answers["rows"]}
    assert rows["dog", "puppy"]["other_right_answers"] == ["pup"]
    assert rows["dog", "pup"]["other_right_answers"] == ["puppy"]
    for name in ("base", "with"):
        assert {row[f"written_{name}"].partition("\n")[0] for row in rows.values()} == {" puppy"}
        assert {key for key, row in rows.items() if row[f"exact_{name}"]} == {("dog", "puppy"), ("dog", "pup")}
        assert {key for key, row in rows.items() if row[f"begins_{name}"]} == {("dog", "puppy")}
