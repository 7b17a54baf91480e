from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from parity import all_heads, assert_close, assert_same_scores, replacements
from relfv.engine import prefix
from relfv.engine.prefix import Prefixes, prompts_a_batch
from relfv.engine.shared_prefix import SharedPrefixEngine
from relfv.language_model import open_model
from relfv.types import Prompts

PROMPTS = [[5, 6, 7, 8, 9], [11, 12, 13]]


def test_a_prefix_is_what_the_model_caches_without_its_last_blocks_mlp(llama_path: Path) -> None:
    model = open_model(str(llama_path))
    arch, ran = model.arch, []
    handles = [block.mlp.register_forward_hook(lambda *_, n=n: ran.append(n)) for n, block in enumerate(arch.blocks)]
    with model.backbone.running():
        prefix = Prefixes(model.backbone, PROMPTS).run(slice(0, 2))
    for handle in handles:
        handle.remove()
    assert ran == [*range(arch.n_layers - 1)]
    for n, prompt in enumerate(PROMPTS):
        cache = DynamicCache()
        with model.backbone.running():
            arch.decoder(input_ids=torch.tensor([prompt[:-1]], device=model.backbone.device), past_key_values=cache)
        for layer in range(arch.n_layers):
            for found, whole in zip((prefix.keys, prefix.values), _of(cache, layer), strict=True):
                assert_close(found[layer][n, :, : len(prompt) - 1].cpu(), whole[0].cpu())


@pytest.mark.parametrize(("resid_dim", "batches"), [(2048, 1), (4096, 1), (5120, 1), (8192, 2), (16384, 4)])
def test_only_wide_models_have_batches_that_are_as_fast_as_all_prefixes_at_once(resid_dim: int, batches: int) -> None:
    assert -(-25 // prompts_a_batch([[0] * 75] * 25, resid_dim)) == batches
    assert prompts_a_batch([[0] * 9000] * 3, resid_dim) == 1


def test_a_batch_of_prefixes_runs_when_its_turn_comes(llama_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over several cards the first pass begins after the first batch."""
    model = open_model(str(llama_path))
    backbone, prompts = model.backbone, Prompts([*PROMPTS, [3, 4, 5, 6]], [5, 17, 123])
    heads, values = all_heads(backbone), replacements(backbone, PROMPTS)
    at_once = SharedPrefixEngine(backbone).sweep_heads(prompts, values, heads, per_pass=1)
    monkeypatch.setattr(prefix, "prompts_a_batch", lambda *_: 2)
    seen: list[tuple[int, ...]] = []
    count = backbone.decoder.register_forward_pre_hook(
        lambda _, __, kw: seen.append(tuple(kw["input_ids"].shape)), with_kwargs=True
    )
    found = SharedPrefixEngine(backbone).sweep_heads(prompts, values, heads, per_pass=1)
    count.remove()
    assert seen == [(2, 4), (1, 1), (1, 1), (1, 4), (1, 1)]
    assert_same_scores(found.edited, at_once.edited)


def _of(cache: Any, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    return cache.layers[layer].keys, cache.layers[layer].values
