"""The clean prompts, run once: see relfv/engine/clean.py."""

from __future__ import annotations

from collections.abc import Sequence

from relfv.engine.clean import CleanRun as CleanTrials
from relfv.engine.clean import run_clean
from relfv.language_model import LanguageModel
from relfv.types import Prompts

__all__ = ["CleanTrials", "run_clean_trials"]


def run_clean_trials(model: LanguageModel, clean_prompts: Sequence[str], target_ids: Sequence[int]) -> CleanTrials:
    """Run the clean prompts once and keep what later stages need of them."""
    return run_clean(model.backbone, Prompts([model.tokens.encode(p) for p in clean_prompts], target_ids))
