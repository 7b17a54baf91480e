"""A large vocabulary on a CPU: in tiles the same numbers as in whole rows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from conftest import llama
from parity import largest, rounding
from relfv.engine.arithmetic import Arithmetic, logits
from relfv.models.architecture import Architecture, resolve


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


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> Architecture:
    """700 tokens, which count as many here; 100 of them and 50 others are read for a copy."""
    monkeypatch.setattr(logits, "_TILE_TOKENS", 100)
    monkeypatch.setattr(logits, "N_LIKELIEST", 100)
    monkeypatch.setattr(logits, "N_OTHERS", 50)
    return resolve(llama(700), "auto")


def read(arch: Architecture, hidden: torch.Tensor, targets: list[int], over_likeliest: bool) -> logits.Scores:
    with torch.inference_mode():
        wanted = torch.tensor(targets)
        some = logits.likeliest_tokens(arch, hidden[:, 0], wanted) if over_likeliest else None
        found = logits.score(arch, hidden, wanted, pieces=None, may_use_kernels=False, likeliest=some)
    return tuple(values.clone() for values in found)  # type: ignore[return-value]


def test_over_the_likeliest_tokens_small_edits_score_as_over_all(large: Architecture) -> None:
    generator = torch.Generator().manual_seed(0)
    base = 0.2 * torch.randn(3, 1, 48, generator=generator)
    hidden = base + 0.02 * torch.randn(3, 9, 48, generator=generator)
    hidden[:, :2] = base
    whole, brief = (read(large, hidden, [5, 250, 699], way) for way in (False, True))
    limit = rounding(largest(whole[0]))
    assert largest(whole[0] - brief[0]) <= limit
    assert largest(whole[1][:, :2] - brief[1][:, :2]) <= limit  # not edited: the others' share is what it is
    assert torch.equal(brief[1][:, 0], brief[1][:, 1])
    assert torch.equal(whole[2], brief[2])
    error, moved = whole[1] - brief[1], whole[1] - whole[1][:, :1]
    assert 0 < largest(error) < 0.05 * largest(moved)


def test_what_an_edit_does_to_all_other_tokens_is_seen_in_a_few(large: Architecture) -> None:
    generator = torch.Generator().manual_seed(0)
    base, edit = 0.2 * torch.randn(3, 1, 48, generator=generator), 0.1 * torch.randn(1, 40, 48, generator=generator)
    hidden = torch.cat([base, base + edit], dim=1)
    (_, whole, _), (_, brief, _) = (read(large, hidden, [5, 250, 699], way) for way in (False, True))
    error, moved = brief - whole, whole - whole[:, :1]
    assert error.norm() < 0.1 * moved.norm()


def test_a_token_that_only_an_edit_makes_likely_leaves_the_target_too_much(large: Architecture) -> None:
    weight = large.lm_head.weight.detach()  # type: ignore[union-attr, operator]
    base = 3 * torch.randn(1, 1, 48, generator=torch.Generator().manual_seed(0))
    unlikely = int((weight @ base[0, 0]).argmin())
    hidden = torch.cat([base, base + 200 * weight[unlikely] / weight[unlikely].norm()], dim=1)
    whole, brief = (read(large, hidden, [5], way) for way in (False, True))
    assert int(whole[2][0, 1]) == unlikely
    assert brief[1][0, 1] > whole[1][0, 1]
    of_target = read(large, hidden, [unlikely], True)
    assert largest(of_target[1][0, 1] - read(large, hidden, [unlikely], False)[1][0, 1]) <= rounding(largest(whole[0]))


def test_only_a_large_vocabulary_on_a_cpu_is_read_over_the_likeliest_tokens(large: Architecture) -> None:
    arithmetic = Arithmetic(llama(700), large, "exact")
    assert arithmetic.over_likeliest_tokens().over_likeliest
    small = Arithmetic(llama(300), resolve(llama(300), "auto"), "exact")
    assert small.over_likeliest_tokens() is small


def test_the_likeliest_tokens_and_a_few_others_are_all_that_a_copy_is_multiplied_with(
    large: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    products, linear = [], nn.functional.linear

    def counted(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        products.append(len(rows) * len(weight))
        return linear(rows, weight, bias)

    monkeypatch.setattr(nn.functional, "linear", counted)
    read(large, torch.randn(3, 9, 48), [5, 250, 699], True)
    assert sum(products) == 3 * 700 + 3 * 9 * (101 + 50)
