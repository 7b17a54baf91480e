"""What attention really adds to the residual stream, split by head.

In most families that is W_O z of each head, and the output bias. Some put a norm between (Gemma 2 and 3, OLMo 2, GLM-4)
or multiply by a constant (Granite). An RMS norm is linear once its factor is known: norm(u) = gain * u / rms(u), so
with the factor that a prompt really had, the parts of heads and bias sum to what was added, to the last digit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from relfv.engine.base import Backbone, TokenIds
from relfv.engine.hooks import editing_inputs, editing_outputs
from relfv.engine.passes import last_tokens

_LARGE = 1e3
"""Value of a constant input vector, so large that a norm's epsilon does not show: the norm of that vector is the
gain."""


@dataclass(frozen=True)
class Writing:
    """Steps between W_O z and the residual stream: a head's part is gains * W_O (factors * z)."""

    factors: torch.Tensor
    """float64 (prompt, layer): the norm's factor on each prompt, 1 / rms, times the family's residual multiplier."""
    gains: torch.Tensor | None
    """float64 (layer, resid_dim): the norm's weight, as it acts; None without a norm."""

    @property
    def is_plain(self) -> bool:
        """True where W_O z is added as it is."""
        return self.gains is None and bool((self.factors == 1).all())

    def gained(self, layer: int, projected: torch.Tensor) -> torch.Tensor:
        """``projected``, float64 (..., resid_dim), times the gain."""
        return projected if self.gains is None else self.gains[layer] * projected


class WritingRecorder:
    """Reads the norms' factors and gains in ordinary passes."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self._factors: list[torch.Tensor] = []
        self._gains: dict[int, torch.Tensor] = {}

    @contextmanager
    def reading(self, prompts: TokenIds) -> Iterator[None]:
        """While open, one pass over ``prompts`` is read; without norms nothing is hooked."""
        arch = self._backbone.arch
        factors = torch.ones(len(prompts), arch.n_layers, dtype=torch.float64)
        if arch.attention_norms is None:
            yield
        else:
            before: dict[int, torch.Tensor] = {}
            after: dict[int, torch.Tensor] = {}
            norms = [*arch.attention_norms.items()]
            with (
                editing_inputs([(norm, self._reader(before, layer, prompts)) for layer, norm in norms]),
                editing_outputs([(norm, self._reader(after, layer, prompts, norm)) for layer, norm in norms]),
            ):
                yield
            for layer, _ in norms:
                gained = self._gains[layer] * before[layer]
                # Least squares: one number for resid_dim equations that all have the same solution.
                factors[:, layer] = (gained * after[layer]).sum(1) / (gained**2).sum(1).clamp_min(1e-300)
        self._factors.append(factors * arch.residual_multiplier)

    def _reader(
        self, seen: dict[int, torch.Tensor], layer: int, prompts: TokenIds, norm: Any = None
    ) -> Callable[[torch.Tensor], None]:
        at_last = last_tokens(self._backbone, prompts)

        def read(values: torch.Tensor) -> None:
            seen[layer] = at_last(values).double().cpu()
            if norm is not None and layer not in self._gains:  # while its weights are those that the pass computes with
                flat = torch.full((1, 1, values.shape[-1]), _LARGE, device=values.device)
                self._gains[layer] = norm.forward(flat)[0, 0].double().cpu()

        return read

    def result(self) -> Writing:
        """The ``Writing`` of all passes that were read."""
        arch, gains = self._backbone.arch, None
        if self._gains:
            gains = torch.ones(arch.n_layers, arch.resid_dim, dtype=torch.float64)
            for layer, gain in self._gains.items():
                gains[layer] = gain
        return Writing(torch.cat(self._factors), gains)
