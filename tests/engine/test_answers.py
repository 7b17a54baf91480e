from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from parity import assert_close, largest, rounding, size
from relfv.engine.answers import N_TOP, Injection, decode_vector, score_answers
from relfv.engine.clean import run_clean
from relfv.language_model import LanguageModel, open_model
from relfv.types import Prompts

PROMPTS = ["Q: dog\nA: puppy\n\nQ: cat\nA:", "Q: cow\nA:", "Q: a longer one than that\nA:"]
ANSWERS = [[5, 9, 7], [11], [3, 300]]


@pytest.fixture(scope="module")
def model(llama_path: Path) -> LanguageModel:
    return open_model(str(llama_path))


def encoded(model: LanguageModel) -> list[list[int]]:
    return [model.tokens.encode(prompt) for prompt in PROMPTS]


def on_device(model: LanguageModel, ids: list[int]) -> torch.Tensor:
    """One text where the model is."""
    return torch.tensor([ids], device=model.backbone.device)


def vector(model: LanguageModel) -> torch.Tensor:
    return 3 * torch.randn(model.arch.resid_dim, generator=torch.Generator().manual_seed(0)).to(model.backbone.device)


def test_an_answers_log_probability_is_the_sum_over_its_tokens(model: LanguageModel) -> None:
    found = score_answers(model.backbone, encoded(model), ANSWERS)
    for prompt, answer, scored in zip(PROMPTS, ANSWERS, found, strict=True):
        ids = model.tokens.encode(prompt)
        texts = [[*ids, *answer[:n]] for n in range(len(answer))]
        one_by_one = [run_clean(model.backbone, Prompts([t], [a])).scores for t, a in zip(texts, answer, strict=True)]
        expected = sum(float(token.logprob[0]) for token in one_by_one)
        assert scored.logprob == pytest.approx(expected, abs=len(answer) * rounding(size(*one_by_one)))
        assert len(scored.written) == len(answer)


def test_written_tokens_rank_and_top_are_those_of_one_pass_at_a_time(model: LanguageModel) -> None:
    found = score_answers(model.backbone, encoded(model), ANSWERS)
    for prompt, answer, scored in zip(PROMPTS, ANSWERS, found, strict=True):
        text, written = model.tokens.encode(prompt), []
        for n in range(len(answer)):
            with torch.no_grad():
                logits = model.backbone.model(on_device(model, [*text, *written])).logits[0, -1]
            if n == 0:
                assert scored.rank == 1 + int((logits > logits[answer[0]]).sum())
                assert [token for token, _ in scored.top] == logits.topk(N_TOP).indices.tolist()
                assert scored.top[0][1] == pytest.approx(float(logits.softmax(-1).max()), abs=rounding(largest(logits)))
            written.append(int(logits.argmax()))
        assert scored.written == written


def test_the_vector_acts_from_the_last_prompt_token_on(model: LanguageModel) -> None:
    v, layer = vector(model), 1
    found = score_answers(model.backbone, encoded(model), ANSWERS, Injection(layer, v))
    ids = encoded(model)
    for n, (prompt, answer) in enumerate(zip(ids, ANSWERS, strict=True)):
        begin = len(prompt) - 1

        def add(_, __, out, start=begin):  # type: ignore[no-untyped-def]
            hidden = (out[0] if isinstance(out, tuple) else out).clone()
            hidden[:, start:] += v
            return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

        handle = model.arch.blocks[layer].register_forward_hook(add)
        with torch.no_grad():
            logits = model.backbone.model(on_device(model, [*prompt, *answer[:-1]])).logits[0]
        handle.remove()
        expected = sum(float(logits.log_softmax(-1)[begin + i, token]) for i, token in enumerate(answer))
        assert found[n].logprob == pytest.approx(expected, abs=len(answer) * rounding(largest(logits)))
    first = model.engine.inject(Prompts(ids, [answer[0] for answer in ANSWERS]), v[None], [layer])
    single = score_answers(model.backbone, encoded(model), [answer[:1] for answer in ANSWERS], Injection(layer, v))
    assert_close(torch.tensor([s.logprob for s in single]), first.edited.logprob[:, 0], size(first.edited))
    untouched = score_answers(model.backbone, encoded(model), ANSWERS)
    assert max(abs(a.logprob - b.logprob) for a, b in zip(found, untouched, strict=True)) > 0.1


def out_projs(model: LanguageModel) -> list[nn.Module]:
    return [*model.arch.out_projs.values()]


def test_a_decoded_vector_is_what_norm_and_unembedding_make_of_it(model: LanguageModel) -> None:
    v = vector(model)
    with torch.no_grad():
        logits = model.backbone.model.lm_head(model.backbone.model.model.norm(v))
    p = logits.softmax(-1)
    ran: list[nn.Module] = []
    handles = [projection.register_forward_hook(lambda m, _, __: ran.append(m)) for projection in out_projs(model)]
    found = decode_vector(model.backbone, [0], v)
    assert ran == out_projs(model)[:1], "what the last block gives is replaced: the others need not run"
    for handle in handles:
        handle.remove()
    assert [token for token, _ in found] == p.topk(len(found)).indices.tolist()
    assert found[0][1] == pytest.approx(float(p.max()), abs=rounding(largest(logits)))
