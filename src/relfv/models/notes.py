"""Notes on a model for readers of the results; every record carries them."""

from __future__ import annotations

from typing import Any

import torch


def what_lies_between(norms: Any, multiplier: float) -> tuple[str, ...]:
    """A note for families that scale or norm what attention writes before it joins the residual stream."""
    steps = [*(["norms"] if norms else []), *([f"multiplies by {multiplier}"] if multiplier != 1.0 else [])]
    if not steps:
        return ()
    return (
        f"this family {' and '.join(steps)} what attention writes before adding it to the residual stream; the "
        "function vector is W_O times the mean activation, as defined, without that step, so alpha = 1 is not the "
        "heads' natural size here; step6/controls.json has the heads put in place and the vector as written",
    )


def rounded_or_capped(model: Any, config: Any) -> tuple[str, ...]:
    """Notes on logits that are capped, and on embeddings that are scaled by a rounded number."""
    notes = []
    if cap := getattr(config, "final_logit_softcapping", None):
        notes.append(f"this family caps its logits softly at {cap:g}: effects on logits near the cap come out small")
    scaled = (module for module in model.modules() if getattr(module, "scalar_embed_scale", None))
    table = next(scaled, None)
    scale, stored = getattr(table, "scalar_embed_scale", None), getattr(table, "embed_scale", None)
    if scale and isinstance(stored, torch.Tensor) and not stored.is_meta and abs(float(stored) / scale - 1) > 1e-5:
        notes.append(
            f"this family scales its embeddings by {scale:.6g}, which its weights' {stored.dtype} rounds to "
            f"{float(stored):.6g}; the rounded one is used in every precision, as in the model's own code"
        )
    return tuple(notes)
