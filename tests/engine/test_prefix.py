from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionMaskInterface, DynamicCache

from parity import assert_close
from relfv.engine.answers import score_answers
from relfv.engine.arithmetic import logits
from relfv.engine.clean import run_clean
from relfv.engine.passes import masks_without_waiting
from relfv.engine.prefix import Prefill
from relfv.engine.shared_prefix import SharedPrefixEngine
from relfv.language_model import open_model
from relfv.progress import at_work
from relfv.types import Prompts

PROMPTS = [[5, 6, 7, 8, 9], [11, 12, 13]]


def test_a_prefix_is_what_the_model_caches_without_its_last_blocks_mlp(llama_path: Path) -> None:
    model = open_model(str(llama_path))
    arch, ran = model.arch, []
    handles = [block.mlp.register_forward_hook(lambda *_, n=n: ran.append(n)) for n, block in enumerate(arch.blocks)]
    with model.backbone.running():
        prefix = Prefill(model.backbone, PROMPTS).run()
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


def _of(cache: Any, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    return cache.layers[layer].keys, cache.layers[layer].values


@pytest.mark.parametrize("prompts", [PROMPTS, [PROMPTS[0], PROMPTS[0][::-1]]], ids=["padded", "of one length"])
def test_no_pass_begins_by_asking_the_device_whether_there_is_padding(
    llama_path: Path, monkeypatch: pytest.MonkeyPatch, prompts: list[list[int]]
) -> None:
    model, asked = open_model(str(llama_path)), list[torch.Tensor]()
    before = AttentionMaskInterface()["sdpa"]

    def truth(tensor: torch.Tensor) -> bool:
        asked.append(tensor)
        return bool(tensor.item())

    with monkeypatch.context() as patched, model.backbone.running():
        patched.setattr(torch.Tensor, "__bool__", truth)
        Prefill(model.backbone, prompts).run()
        run_clean(model.backbone, Prompts(prompts, [5, 6]))
        score_answers(model.backbone, prompts, [[5, 6], [7]])
    assert model.backbone.model.config._attn_implementation == "sdpa"
    assert asked == []
    assert AttentionMaskInterface()["sdpa"] is before


def test_models_that_run_beside_in_another_thread_see_their_own_padding(llama_path: Path) -> None:
    model: Any = open_model(str(llama_path)).backbone.model
    tokens, real = [[1, 1, 5, 6], [4, 5, 6, 7]], [[0, 0, 1, 1], [1, 1, 1, 1]]
    ids, mask = (torch.tensor(rows, device=model.device) for rows in (tokens, real))

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=mask).logits[0, -1]

    alone = logits()
    with masks_without_waiting(is_padded=False), ThreadPoolExecutor(1) as other:
        assert torch.equal(other.submit(logits).result(), alone)
        assert not torch.equal(logits(), alone)
    assert torch.equal(logits(), alone)


def test_what_is_read_in_brief_is_found_once_for_some_prompts_whichever_pass_comes_first(
    llama_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_model(str(llama_path), device="cpu")
    for name, value in {"_TILE_TOKENS": 16, "N_LIKELIEST": 20, "N_OTHERS": 10}.items():
        monkeypatch.setattr(logits, name, value)
    brief, vectors = model.engine.over_likeliest_tokens(), torch.ones(2, model.arch.resid_dim)
    head, whole = model.arch.lm_head.weight, list[int]()
    linear = torch.nn.functional.linear

    def counted(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if weight.untyped_storage().data_ptr() == head.untyped_storage().data_ptr():  # type: ignore[union-attr]
            whole.append(len(rows) * len(weight))
        return linear(rows, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    prompts = Prompts(PROMPTS, [5, 6])
    brief.inject(prompts, vectors[:1], [0])
    after = brief.inject(prompts, vectors, [0, 1])
    assert sum(whole) == len(PROMPTS) * len(head)  # type: ignore[arg-type]
    alone = SharedPrefixEngine(brief.backbone).inject(prompts, vectors, [0, 1])
    assert torch.equal(after.edited.logprob, alone.edited.logprob)
    brief.inject(Prompts(PROMPTS, [7, 8]), vectors, [0])
    assert sum(whole) == 3 * len(PROMPTS) * len(head)  # type: ignore[arg-type]


def test_a_pass_on_a_cpu_tells_which_layer_it_is_in(llama_path: Path) -> None:
    model, told = open_model(str(llama_path), device="cpu"), list[str]()
    with at_work("stage", "") as task:
        handles = [block.register_forward_hook(lambda *_: told.append(task.layer)) for block in model.arch.blocks]
        run_clean(model.backbone, Prompts(PROMPTS, [5, 6]))
        for handle in handles:
            handle.remove()
        assert not task.layer
    n_layers = model.arch.n_layers
    assert told == [f"layer {layer} of {n_layers}" for layer in range(1, n_layers + 1)]
