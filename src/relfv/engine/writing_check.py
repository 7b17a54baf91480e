"""Check whether the heads' parts as written (writing.py) are what attention adds to the residual stream of this very
model.

Where a family adds it is nowhere to be read, only to be seen: any step between, known to relfv or not, shows here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from relfv.engine.arithmetic import widened
from relfv.engine.base import Backbone
from relfv.engine.clean import run_clean
from relfv.models.streaming import brought
from relfv.types import Prompts


def writing_error(backbone: Backbone, prompt: Sequence[int], layers: Sequence[int]) -> float:
    """Distance of the heads' parts and the bias, as written, from what attention adds to the residual stream, relative
    to its length: the largest of ``layers``.

    What is added is found where the block goes on with it: a module gets the block's input + it, or the block's output
    is the sum of both and of another module's output. About 1 where no such place is found: then it is not known what
    this family adds.
    """
    arch = backbone.arch
    with ExitStack() as stack, backbone.running():
        seen = {layer: stack.enter_context(_everything(arch.blocks[layer])) for layer in layers}
        clean = run_clean(backbone, Prompts([prompt], [0]))
    errors = []
    for layer in layers:
        parts = arch.project_heads(layer, range(arch.n_heads), clean.activations[0, layer]).cpu()
        with backbone.running(), brought(arch.out_projs[layer], backbone.device), widened(arch.out_projs[layer]):
            zero = torch.zeros(1, 1, arch.n_heads * arch.head_dim, device=backbone.device)
            bias = arch.out_projs[layer](zero).cpu().double()[0, 0]
        writing = clean.writing
        assert writing
        expected = writing.factors[0, layer] * writing.gained(layer, parts + bias)
        start, end, inputs, outputs = seen[layer](arch.resid_dim)
        found = [*(x - start for x in inputs), *(end - start - y for y in outputs)]
        scale = max(float(expected.norm()), 1e-3 * float(start.norm()))
        errors.append(min((float((one - expected).norm()) / scale for one in found), default=torch.inf))
    return max(errors)


@contextmanager
def _everything(block: nn.Module) -> Iterator[Any]:
    """While open, records what goes into and comes out of each module of ``block``, at the last token of a pass over
    one prompt; yields a function of resid_dim: block input, block output, modules' inputs, modules' outputs."""
    inputs: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []
    own: dict[str, torch.Tensor] = {}

    def first(values: Any) -> torch.Tensor | None:
        values = values[0] if isinstance(values, tuple | list) and values else values
        is_hidden = isinstance(values, torch.Tensor) and values.is_floating_point() and values.dim() >= 2
        return values.reshape(-1, values.shape[-1])[-1].double().cpu() if is_hidden else None

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = first(args) if args else first(kwargs.get("hidden_states"))
        if module is block:
            own.update(start=given, end=first(output))  # type: ignore[arg-type]
            return
        inputs.extend([] if given is None else [given])
        outputs.extend([] if (made := first(output)) is None else [made])

    handles = [m.register_forward_hook(hook, with_kwargs=True) for m in block.modules()]

    def seen(width: int) -> Any:
        inside = [[v for v in values if len(v) == width] for values in (inputs, outputs)]
        return own["start"], own["end"], *inside

    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
