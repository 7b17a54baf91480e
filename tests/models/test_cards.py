"""One model over several cards: how layers are shared out, and on two GPUs the bits of one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from conftest import llama, scale_up
from folders import arguments, contents
from parity import all_heads, prompts_of_different_length, replacements
from relfv.cli import main
from relfv.engine.arithmetic import Arithmetic
from relfv.engine.base import Backbone
from relfv.engine.selfcheck import choose_engine
from relfv.engine.shared_prefix import SharedPrefixEngine
from relfv.errors import InputError
from relfv.models.architecture import resolve
from relfv.models.cards import shares_of_cards, spread
from relfv.models.devices import choose_devices
from relfv.models.placement import Sizes
from relfv.types import Prompts
from zoo import ZOO

PROMPTS, _ = prompts_of_different_length()
FAMILIES = [name for name, animal in ZOO.items() if animal.engine == "shared_prefix"][::6]
two_cards = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def shared(n: int, cards: list[int | None], *, block: int = 10, rest: int = 0) -> list[int]:
    return shares_of_cards("it", Sizes((block,) * n, rest, ()), cards, 0, 0.0)


def test_late_layers_are_most_of_a_sweep_so_the_last_card_gets_fewer() -> None:
    counts = shared(80, [None, None])
    work = [sum(range(1, counts[0] + 1)), sum(range(counts[0] + 1, 81))]
    assert sum(counts) == 80
    assert max(work) / sum(work) < 0.51
    assert counts[0] > 50


def test_memory_comes_before_balance() -> None:
    assert shared(80, [450, 450]) == [45, 35]
    assert sum(shared(7, [30, 30, 30])) == 7
    with pytest.raises(InputError, match=r"its weights take .* GB, and the cards together have .* use more cards"):
        shared(80, [390, 390])


def test_cards_that_are_not_there_or_no_cards_are_refused() -> None:
    with pytest.raises(InputError, match="expected different CUDA devices around each"):
        choose_devices("cpu+cpu")
    with pytest.raises(InputError, match="--devices 'cuda:99'"):
        choose_devices("cpu+cuda:99", "--devices")


@pytest.mark.parametrize("tied", [True, False])
def test_a_spread_model_computes_as_it_did(tied: bool) -> None:
    """On one device twice: what moves is nothing, what is hooked is all."""
    model, cpu = llama(tie_word_embeddings=tied), torch.device("cpu")
    arch = resolve(model, "llama3")
    alone = Backbone(model, arch, cpu, Arithmetic.with_kernels(model, arch, "exact"))
    values, heads = replacements(alone, PROMPTS), all_heads(alone)
    prompts = Prompts(PROMPTS, [1] * len(PROMPTS))
    one = SharedPrefixEngine(alone).sweep_heads(prompts, values, heads, per_pass=1)
    cards = spread(model, arch, [2, 1], [cpu, cpu])
    both = Backbone(model, arch, cpu, alone.arithmetic, cards=cards)
    two = SharedPrefixEngine(both).sweep_heads(prompts, values, heads, per_pass=1)
    assert torch.equal(one.edited.logprob, two.edited.logprob)


@two_cards
@pytest.mark.parametrize("name", FAMILIES)
def test_two_cards_give_the_bits_of_one(name: str) -> None:
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    found = []
    for counts in (None, None, 1):
        model = scale_up(ZOO[name].build()).to(first, torch.bfloat16)
        arch = resolve(model, "auto")
        cards = spread(model, arch, [counts, arch.n_layers - counts], [first, second]) if counts else None
        arithmetic = Arithmetic.with_kernels(model, arch, "exact")
        backbone = Backbone(model, arch, first, arithmetic, cards=cards)
        engine, check = choose_engine(backbone, PROMPTS)
        values = replacements(backbone, PROMPTS).cpu()
        prompts, vector = Prompts(PROMPTS, [1] * len(PROMPTS)), torch.ones(1, arch.resid_dim)
        swept = engine.sweep_heads(prompts, values, all_heads(backbone), per_pass=1)
        injected = engine.inject(prompts, vector, range(arch.n_layers), per_pass=1)
        found.append((check.engine, engine.backbone.arithmetic.facts(), values, swept.edited.logprob,
                      injected.edited.logprob, injected.lengths))  # fmt: skip
    assert found[0][:2] == found[2][:2]
    if not all(map(torch.equal, found[0][2:], found[1][2:])):
        pytest.skip("not the same bits twice on one card")
    for one, two in zip(found[0][2:], found[2][2:], strict=True):
        assert torch.equal(one, two)


@two_cards
def test_a_whole_run_over_two_cards_has_the_files_of_one(llama_path: Path, csv_path: Path, tmp_path: Path) -> None:
    for device in ("cuda:0", "cuda:0+cuda:1"):
        flags = ("--device", device, "--q_list", "A1", "--extras", "ablation,mlp,positions,attribution")
        assert main(arguments(llama_path, csv_path, tmp_path / device, *flags)) == 0
    one, two = (contents(tmp_path / device / "pairs/A1/artifacts") for device in ("cuda:0", "cuda:0+cuda:1"))
    assert one.keys() == two.keys()
    manifest = json.loads((tmp_path / "cuda:0+cuda:1/pairs/run_manifest.json").read_text())
    assert "layers on cuda:1" in manifest["model"]["weights"]
    assert one == two


@two_cards
def test_processes_on_a_card_each_have_the_files_of_one(llama_path: Path, csv_path: Path, tmp_path: Path) -> None:
    for flags in (("--device", "cuda:0"), ("--devices", "all")):
        assert main(arguments(llama_path, csv_path, tmp_path / flags[1], *flags)) == 0
    for q_id in ("A1", "B2"):
        one, all_ = (contents(tmp_path / name / "pairs" / q_id / "artifacts") for name in ("cuda:0", "all"))
        assert one == all_
