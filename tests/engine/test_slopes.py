from __future__ import annotations

from pathlib import Path

import torch

from relfv.engine.reference import ReferenceEngine
from relfv.engine.slopes import patch_slopes
from relfv.language_model import open_model
from relfv.types import HeadId, Prompts

HEADS = [HeadId(0, 3), HeadId(2, 0), HeadId(2, 0), HeadId(2, 1)]
TEXTS = [f"Q: dog\nA: calf\n\nQ: {word}\nA:" for word in ("cat", "sheep", "a frog")]


def test_slopes_are_what_small_changes_of_a_patch_show(llama_path: Path) -> None:
    model = open_model(str(llama_path))
    prompts = Prompts([model.tokens.encode(text) for text in TEXTS], [5, 6, 7])
    random = torch.Generator().manual_seed(0)
    values, step = (torch.randn(len(HEADS), model.arch.head_dim, generator=random) for _ in range(2))
    found = patch_slopes(model.engine, prompts, values, HEADS, per_pass=2)
    assert found is not None
    slopes, per_pass = found
    assert per_pass == 2
    higher, lower = (
        torch.from_numpy(model.engine.sweep_heads(prompts, values + by * step, HEADS).edited.measure("p"))
        for by in (0.02, -0.02)
    )
    expected = (higher - lower) / 0.04
    assert (torch.einsum("thd,hd->th", slopes, step.double()) - expected).abs().max() < 0.01 * expected.abs().max()
    assert patch_slopes(ReferenceEngine(model.backbone), prompts, values, HEADS) is None
