"""Whole answers to prompts as text: see relfv/engine/answers.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from relfv.engine import answers as engine
from relfv.engine.answers import Injection, ScoredAnswer
from relfv.language_model import LanguageModel


def score_answers(
    model: LanguageModel, prompts: Sequence[str], answers: Sequence[Sequence[int]], injection: Injection | None = None
) -> list[ScoredAnswer]:
    """Score ``answers`` (token ids) after ``prompts``."""
    return engine.score_answers(model.backbone, [model.tokens.encode(p) for p in prompts], answers, injection)


def decode_vector(model: LanguageModel, vector: torch.Tensor) -> list[tuple[int, float]]:
    """The tokens that final norm and unembedding make of ``vector`` (resid_dim,)."""
    return engine.decode_vector(model.backbone, model.tokens.encode("a")[:1], vector)
