"""Checks that a model must pass before any engine can be right about it.

Both engines read heads at the output projections' inputs, add vectors to what blocks pass on, and turn the last hidden
state into logits themselves. Each check compares one of these with what the model's own plain pass does. A model that
fails is refused: comparing the engines with each other could not show it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from relfv.engine.arithmetic import widened
from relfv.engine.base import Backbone, TokenIds
from relfv.engine.hooks import editing_outputs
from relfv.engine.passes import capture_heads, last_hidden, reading_heads
from relfv.errors import RunError
from relfv.models.packed import is_opaque
from relfv.models.streaming import brought

TOLERANCE = 1e-3
"""Largest accepted difference in log-probability (nats), float32 both ways, as a share of the intervention's effect
where that is above one nat. A wrong mask, position or cache is off by far more; float32 rounding by far less."""

RELATIVE_TOLERANCE = 0.02
"""Accepted relative error of projected heads and hidden states. 8-bit products reach a percent; a missing scale or a
wrong mask is off by far more."""


def is_packed(backbone: Backbone) -> bool:
    """Whether weights are multiplied by a format's own code: the products may depend on what shares the batch."""
    return is_opaque(backbone.model)


@dataclass(frozen=True)
class Alone:
    """Values read in an ordinary pass over one prompt, which is alone in its batch."""

    z: torch.Tensor
    """float32 (layer, head, head_dim): the heads' outputs at the last token."""
    final: torch.Tensor
    """(1, resid_dim): the final hidden state there."""
    shapes: list[tuple[int, ...] | str]
    """Shape of each block's output, or the name of its type where it is no tensor."""
    last: torch.Tensor
    """(1, token, resid_dim): output of the last block."""
    logprobs: torch.Tensor
    """float32 (token id,), on the CPU: what the model itself makes of ``final``."""


def run_alone(backbone: Backbone, prompt: Sequence[int]) -> Alone:
    """Run one pass of the whole model over ``prompt`` alone, and read its blocks, heads and logits."""
    shapes: list[tuple[int, ...] | str] = [""] * backbone.arch.n_layers
    last: dict[int, torch.Tensor] = {}
    final: list[torch.Tensor] = []

    def reader(layer: int) -> Callable[[torch.Tensor], None]:
        def read(hidden: torch.Tensor) -> None:
            shapes[layer] = tuple(hidden.shape) if isinstance(hidden, torch.Tensor) else type(hidden).__name__
            last[0] = hidden

        return read

    def read_final(output: Any) -> None:  # a tensor, or an output of transformers that begins with one
        final.append(output[:, -1] if isinstance(output, torch.Tensor) else output[0][:, -1])

    readers = [(block, reader(layer)) for layer, block in enumerate(backbone.arch.blocks)]
    with backbone.running(), editing_outputs([*readers, (backbone.decoder, read_final)]):
        with reading_heads(backbone, [prompt]) as heads:
            ids = torch.tensor([list(prompt)], device=backbone.device)
            logits = backbone.model(input_ids=ids, use_cache=False).logits[0, -1].float()
        return Alone(heads()[0], final[0], shapes, last[0], logits.log_softmax(-1).cpu())


def check_blocks(backbone: Backbone, prompt: Sequence[int], alone: Alone) -> None:
    """Require that blocks pass on one residual stream, (prompts, tokens, resid_dim), and that no token sees a later
    one.

    Raises RunError. A vector added at the last token of several streams (Gemma 3n, hyper-connections) would land
    elsewhere; and a model that looks ahead (BERT) does at a token what it could not do there while it writes.
    """
    name, expected = type(backbone.model).__name__, (1, len(prompt), backbone.arch.resid_dim)
    for layer, shape in enumerate(alone.shapes):
        if shape != expected:
            raise RunError(
                f"{name}: block {layer} passes on {shape}, expected one residual stream, {expected}, to which a vector "
                "can be added at one token; this model cannot be measured correctly"
            )
    shorter: list[torch.Tensor] = []
    with backbone.running(), editing_outputs([(backbone.arch.blocks[-1], shorter.append)]):
        last_hidden(backbone, [prompt[:-1]])
    gap = _relative(alone.last[:, :-1], shorter[0])
    if gap > RELATIVE_TOLERANCE and not is_packed(backbone):  # NaN is named by the check of logits
        raise RunError(
            f"{name} lets tokens see later ones (one more token changes those before it by {gap:.2g}); expected a "
            "causal language model (for BERT's kin: is_decoder true in its config)"
        )


def readout_gap(alone: Sequence[Alone], targets: Sequence[int], logprobs: torch.Tensor) -> float:
    """Compare the model's own log-probability of each prompt's target with relfv's, ``logprobs`` (prompt,): the largest
    difference, infinite for NaN."""
    own = torch.stack([of.logprobs[target] for of, target in zip(alone, targets, strict=True)])
    return float((own - logprobs).abs().nan_to_num(nan=torch.inf).max())


def require_readout(backbone: Backbone, gap: float) -> None:
    """Raise RunError for a ``readout_gap`` beyond rounding: with an unknown last step no engine would be right."""
    if gap > TOLERANCE:
        raise RunError(
            f"{type(backbone.model).__name__} turns hidden states into logits in a way relfv does not know "
            f"(log-probabilities differ by {gap:.2g}); this model cannot be measured correctly"
        )


def check_projection(backbone: Backbone, z: torch.Tensor, layers: list[int]) -> None:
    """Require that the heads' projected parts sum to the projection's output for all of them, without its bias.

    ``z`` is (layer, head, head_dim). Raises RunError: the function vector would be wrong.
    """
    arch = backbone.arch
    for layer in layers:
        parts = arch.project_heads(layer, range(arch.n_heads), z[layer]).cpu()
        rows = torch.stack([z[layer].flatten(), torch.zeros(arch.n_heads * arch.head_dim)])[:, None]
        with backbone.running(), brought(arch.out_projs[layer], backbone.device), widened(arch.out_projs[layer]):
            out = arch.out_projs[layer](rows.to(backbone.device)).cpu().double()[:, 0]
        gap = _relative(parts, out[0] - out[1])
        if not gap <= RELATIVE_TOLERANCE:
            adapted = hasattr(arch.out_projs[layer], "base_layer")  # a layer of peft's around the model's own
            remedy = "merge the adapter into the model first (merge_and_unload)" if adapted else ""
            raise RunError(
                f"{type(backbone.model).__name__}, layer {layer}: the projected heads are off by {gap:.2g} of the "
                "output projection's own result, so a function vector would be wrong; "
                f"{remedy or 'this weight format is not supported'}"
            )


def check_capture(backbone: Backbone, prompts: TokenIds, alone: torch.Tensor) -> None:
    """Require that heads do the same in one padded batch as for one prompt at a time, ``alone`` (prompt, layer, head,
    head_dim).

    Raises RunError: clean means would depend on which prompts share a batch.
    """
    with backbone.running():
        together = capture_heads(backbone, prompts)[0]
    gap = _relative(together, alone)
    if not gap <= RELATIVE_TOLERANCE and not is_packed(backbone):
        raise RunError(
            f"{type(backbone.model).__name__}: heads do other things in a padded batch of prompts than for one prompt "
            f"alone (off by {gap:.2g}), so their means would be wrong; this model cannot be measured correctly"
        )


def _relative(found: torch.Tensor, true: torch.Tensor) -> float:
    return float((found - true).norm() / true.norm().clamp_min(1e-12))
