"""A large vocabulary on a CPU: in tiles the same numbers as in whole rows."""

from __future__ import annotations

import pytest
import torch

from conftest import llama
from parity import largest, rounding
from relfv.engine.arithmetic import logits
from relfv.models.architecture import resolve


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_tiles_give_the_scores_of_whole_rows(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, softcap: float | None
) -> None:
    model = llama(700).to(dtype)
    arch = resolve(model, "auto")
    object.__setattr__(arch, "logit_softcap", softcap)
    hidden = torch.randn(5, 9, 48, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 99, 100, 650, 699])
    weight = arch.lm_head.weight.detach().float()  # type: ignore[union-attr, operator]
    whole = arch.final_logits(hidden @ weight.T)
    monkeypatch.setattr(logits, "_TILE_TOKENS", 100)
    monkeypatch.setattr(logits, "_TILE_ROWS", 7)
    with torch.inference_mode():
        assert logits.in_tiles(arch.lm_head, hidden.device)
        scores = logits.score(arch, hidden, targets, pieces=None, may_use_kernels=False)
    logit, logprob, top = (values.clone() for values in scores)
    limit = rounding(largest(whole))
    at_target = whole.gather(2, targets[:, None, None].expand(5, 9, 1))[..., 0]
    assert largest(logit - at_target) <= limit
    assert largest(logprob - (at_target - whole.logsumexp(2))) <= limit
    chosen = whole.gather(2, top[..., None])[..., 0]
    assert largest(whole.amax(2) - chosen) <= limit


def test_of_equal_logits_the_first_is_the_most_probable(monkeypatch: pytest.MonkeyPatch) -> None:
    arch = resolve(llama(700), "auto")
    arch.lm_head.weight.data[:] = 1.0  # type: ignore[union-attr, operator]
    monkeypatch.setattr(logits, "_TILE_TOKENS", 100)
    with torch.inference_mode():
        _, _, top = logits.score(arch, torch.zeros(2, 1, 48), torch.tensor([5, 6]), pieces=None, may_use_kernels=False)
    assert top.tolist() == [[0], [0]]


def test_what_is_not_a_number_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    arch = resolve(llama(700), "auto")
    monkeypatch.setattr(logits, "_TILE_TOKENS", 100)
    with torch.inference_mode():
        hidden = torch.full((1, 1, 48), torch.nan)
        _, logprob, _ = logits.score(arch, hidden, torch.tensor([5]), pieces=None, may_use_kernels=False)
    assert logprob.isnan().all()


def test_small_vocabularies_are_read_out_as_before() -> None:
    arch = resolve(llama(700), "auto")
    assert not logits.in_tiles(arch.lm_head, torch.device("cpu"))
