"""What the studies beyond StepD to Step6 find, by a program that knows nothing of relfv: the demo model in float64, one
whole forward pass for everything that is tried, hooks of its own."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import ROOT
from folders import arguments
from parity import rounding
from relfv.cli import main

pytestmark = pytest.mark.slow
WEIGHTS, CSV = ROOT / "src/relfv/demo/weights", ROOT / "datasets/relation/relationA_ex.csv"
SOME = (0, 3, 7)
"""Trials."""


@dataclass
class Edits:
    """By layer."""

    heads: Mapping[int, list[tuple[int, int, torch.Tensor]]] = field(default_factory=dict)
    """Token, head, and what it is set to, (head_dim,)."""
    mlp: Mapping[int, torch.Tensor] = field(default_factory=dict)
    """What the MLP's output is set to at the last token, (resid_dim,)."""
    added: Mapping[int, torch.Tensor] = field(default_factory=dict)
    """To the hidden state after the block, at the last token."""
    removed: Mapping[int, torch.Tensor] = field(default_factory=dict)
    """Unit vectors, taken out there."""


class Oracle:
    """The model of a folder in float64."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        self.blocks = self.model.model.layers
        self.width = self.model.config.head_dim
        self.scale = 0.0
        """The largest logit seen."""

    def run(
        self, text: str, edits: Edits | None = None, fed: Sequence[int] = ()
    ) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
        """-> P of every token after ``text`` and the tokens ``fed`` behind it; by layer z of all heads (token, heads *
        head_dim), and what the MLP writes at the last token (resid_dim,). All with gradients."""
        edits = edits or Edits()
        z, mlps = [], []

        def of_heads(layer: int) -> Any:
            def hook(_: Any, given: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
                values = given[0].clone()
                for token, head, value in edits.heads.get(layer, ()):
                    values[0, token, head * self.width : (head + 1) * self.width] = value
                z.append(values)
                return (values,)

            return hook

        def of_mlp(layer: int) -> Any:
            def hook(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
                if layer in edits.mlp:
                    output = output.clone()
                    output[0, -1] = edits.mlp[layer]
                mlps.append(output[0, -1])
                return output

            return hook

        def of_block(layer: int) -> Any:
            def hook(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
                hidden = output.clone()
                if layer in edits.removed:
                    hidden[0, -1] -= (hidden[0, -1] @ edits.removed[layer]) * edits.removed[layer]
                if layer in edits.added:
                    hidden[0, -1] += edits.added[layer]
                return hidden

            return hook

        with ExitStack() as stack:
            for layer, block in enumerate(self.blocks):
                projection = block.self_attn.o_proj
                stack.callback(projection.register_forward_pre_hook(of_heads(layer)).remove)
                stack.callback(block.mlp.register_forward_hook(of_mlp(layer)).remove)
                stack.callback(block.register_forward_hook(of_block(layer)).remove)
            ids = torch.tensor([[*self.tokenizer(text)["input_ids"], *fed]])
            logits = self.model(input_ids=ids, use_cache=False).logits[0, -1]
        self.scale = max(self.scale, float(logits.detach().abs().max()))
        return logits.softmax(-1), z, mlps

    def of_head(self, values: torch.Tensor, head: int) -> torch.Tensor:
        """From z of all heads (..., heads * head_dim)."""
        return values[..., head * self.width : (head + 1) * self.width]

    def places(self, text: str) -> dict[str, list[int]]:
        """The tokens of each class, from where in the text tokens end."""
        ends = [end for _, end in self.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]]
        breaks = [at for at in range(len(text)) if text.startswith("\n\n", at)]
        wanted = {"label": breaks, "separator": [at + 2 for at in breaks], "query": [text.rindex("\nA:")]}
        first = {name: [min(end for end in ends if end >= at) for at in chars] for name, chars in wanted.items()}
        found = {name: [len(ends) - 1 - ends[::-1].index(end) for end in its] for name, its in first.items()}
        return found | {"last": [len(ends) - 1]}


@dataclass
class Studied:
    """A q_id with every study."""

    artifacts: Path
    oracle: Oracle

    def read(self, name: str) -> Any:
        return json.loads((self.artifacts / name).read_text())

    @property
    def trials(self) -> list[dict[str, Any]]:
        return self.read("sampled_trials.json")["trials"]

    @property
    def top(self) -> list[tuple[int, int]]:
        return [(head["layer"], head["head"]) for head in self.read("top_heads.json")["heads"]]

    def near(self, value: float) -> Any:
        """Equal up to what float32 makes of logits of this size."""
        return pytest.approx(value, abs=rounding(self.oracle.scale))

    def at_last(self, texts: Iterable[tuple[str, Sequence[int]]]) -> torch.Tensor:
        """z at the last token (text, layer, heads * head_dim) of texts with what is fed behind each."""
        with torch.no_grad():
            runs = [self.oracle.run(text, fed=fed)[1] for text, fed in texts]
            return torch.stack([torch.stack([z[0, -1] for z in run]) for run in runs])


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> Studied:
    out = tmp_path_factory.mktemp("float64")
    few = ["--n_trials_per_q", "8", "--n_demos", "5", "--topk", "4"]
    extras = ["--extras", "ablation,mlp,new_queries,attribution,positions"]
    assert main([*arguments(WEIGHTS, CSV, out), "--q_list", "Q1", *few, *extras]) == 0
    return Studied(out / "relationA_ex/Q1/artifacts", Oracle(WEIGHTS))


def test_heads_and_directions_taken_away(studied: Studied) -> None:
    trials, oracle, document = studied.trials, studied.oracle, studied.read("stepE/ablation.json")
    clean, shuffled = ([trial[f"{kind}_prompt_str"] for trial in trials] for kind in ("clean", "corrupted"))
    of_shuffled = studied.at_last((text, ()) for text in shuffled)
    others, fed = document["other_relations"]["prompts"], document["other_relations"]["fed_ids"]
    assert fed  # a word that the tokenizer gives a space of its own
    of_others = studied.at_last((one["clean_prompt_str"], fed.get(one["trial_id"], ())) for one in others)
    assert len(of_others) == document["other_relations"]["n_prompts"] == 50
    vector = torch.load(studied.artifacts / "fv_global_resid.pt", weights_only=True)["fv_global_resid"].double()
    unit = vector / vector.norm()
    ways = {"mean": of_shuffled.mean(0), "zero": torch.zeros_like(of_shuffled[0]), "other_relations": of_others.mean(0)}
    seen = 0.0
    for i in SOME:
        edits = {
            f"top, {how}": Edits(
                {
                    layer: [(-1, h, oracle.of_head(values[layer], h)) for at, h in studied.top if at == layer]
                    for layer in range(len(oracle.blocks))
                }
            )
            for how, values in {**ways, "swapped": of_shuffled[i]}.items()
        }
        edits["fv, all"] = Edits(removed=dict.fromkeys(range(len(oracle.blocks)), unit))
        edits["fv, 1"] = Edits(removed={1: unit})
        with torch.no_grad():
            before = float(oracle.run(clean[i])[0][trials[i]["target_first_token_id"]])
            assert document["by_prompt"]["p_clean"][i] == studied.near(before)
            for name, edit in edits.items():
                found = float(oracle.run(clean[i], edit)[0][trials[i]["target_first_token_id"]])
                assert document["by_prompt"]["p_without"][name][i] == studied.near(found), name
                seen = max(seen, abs(found - before))
    assert seen > 0.1


def test_mlps(studied: Studied) -> None:
    trials, oracle, document = studied.trials, studied.oracle, studied.read("stepD_mlp/mlp_cie.json")
    with torch.no_grad():
        means = torch.stack([torch.stack(oracle.run(trial["clean_prompt_str"])[2]) for trial in trials]).mean(0)
        for i in SOME:
            text, target = trials[i]["corrupted_prompt_str"], trials[i]["target_first_token_id"]
            base = float(oracle.run(text)[0][target])
            for layer, mean in enumerate(means):
                change = float(oracle.run(text, Edits(mlp={layer: mean}))[0][target]) - base
                assert document["by_trial"]["delta_p"][str(layer)][i] == studied.near(change), (layer, i)


def test_heads_at_earlier_tokens(studied: Studied) -> None:
    trials, oracle, document = studied.trials, studied.oracle, studied.read("stepD_positions/positions.json")
    best = studied.top[0]
    changes: dict[str, list[float]] = {f"{name}, {of}": [] for name in ("label", "last") for of in ("top", "best")}
    with torch.no_grad():
        there = [oracle.places(trial["clean_prompt_str"]) for trial in trials]
        z = [oracle.run(trial["clean_prompt_str"])[1] for trial in trials]
        for trial in trials:
            text, target = trial["corrupted_prompt_str"], trial["target_first_token_id"]
            base, places = float(oracle.run(text)[0][target]), oracle.places(text)
            for name in ("label", "last"):
                for of, heads in (("top", studied.top), ("best", [best])):
                    edits: dict[int, list[tuple[int, int, torch.Tensor]]] = {}
                    for layer, head in heads:
                        for j, token in enumerate(places[name]):
                            rows = [values[layer][0, at[name][j]] for values, at in zip(z, there, strict=True)]
                            mean = oracle.of_head(torch.stack(rows).mean(0), head)
                            edits.setdefault(layer, []).append((token, head, mean))
                    changes[f"{name}, {of}"].append(float(oracle.run(text, Edits(edits))[0][target]) - base)
    for name in ("label", "last"):
        mean = {of: sum(changes[f"{name}, {of}"]) / len(trials) for of in ("top", "best")}
        assert document["together"][name]["top"]["mean_delta_p"] == studied.near(mean["top"])
        assert document["heads"][0][name]["mean_delta_p"] == studied.near(mean["best"])
    assert max(abs(change) for its in changes.values() for change in its) > 0.01


def test_new_queries(studied: Studied) -> None:
    oracle, document = studied.oracle, studied.read("step6/new_queries.json")
    vector = torch.load(studied.artifacts / "fv_global_resid.pt", weights_only=True)["fv_global_resid"].double()
    assert document["queries"]
    with torch.no_grad():
        for row in document["queries"]:
            text = f"Q: {row['query']}\nA:"
            target = oracle.tokenizer(f"{text} {row['answer']}")["input_ids"][len(oracle.tokenizer(text)["input_ids"])]
            with_it = Edits(added={document["layer"]: document["alpha"] * vector})
            assert row["p_zero_shot"] == studied.near(float(oracle.run(text)[0][target]))
            assert row["p_fv"] == studied.near(float(oracle.run(text, with_it)[0][target]))


def test_attribution(studied: Studied) -> None:
    trials, oracle, document = studied.trials, studied.oracle, studied.read("attribution.json")
    means = studied.at_last((trial["clean_prompt_str"], ()) for trial in trials).mean(0)
    estimates = torch.zeros(len(oracle.blocks), oracle.model.config.num_attention_heads)
    for trial in trials:
        p, z, _ = oracle.run(trial["corrupted_prompt_str"])
        gradients = torch.autograd.grad(p[trial["target_first_token_id"]], z)
        for layer, (values, gradient) in enumerate(zip(z, gradients, strict=True)):
            products = ((means[layer] - values[0, -1]) * gradient[0, -1]).detach()
            estimates[layer] += products.view(-1, oracle.width).sum(1).float() / len(trials)
    assert estimates.abs().max() > 0.01
    for head in document["heads"]:
        assert head["first_order"] == studied.near(float(estimates[head["layer"], head["head"]]))
