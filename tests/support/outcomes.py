"""What opening each model of every_lm.py comes to, judged by hooks of its own on the model's own whole forward pass."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import nn

from conftest import scale_up
from every_lm import tiny_model
from parity import prompts_of_different_length, rounding
from relfv.engine.base import Backbone, Engine
from relfv.engine.clean import run_clean
from relfv.engine.selfcheck import choose_engine
from relfv.errors import RelfvError
from relfv.models.architecture import text_config
from relfv.models.size import depth_of
from relfv.types import HeadId, Prompts
from zoo import plain_backbone

Edit = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Outcome:
    """Of one ``model_type``."""

    engine: str = ""
    """Empty if the model was refused or not built."""
    gap: float = 0.0
    """Largest difference from plain hooks: in log-probability, and in what heads do (relative to its largest)."""
    limit: float = 0.0
    """What rounding may make of it."""
    effect: float = 0.0
    """The largest true effect, in log-probability."""
    layers: tuple[int, ...] = ()
    """Those with heads."""
    depth: int = 0
    """Number of layers."""
    has_layers_in_names: bool = False
    """Whether its weights' names number as many layers as its config asks for."""
    refusal: str = ""
    """relfv's one line."""
    not_built: str = ""
    """Why transformers gave no model, or why it is not tried."""

    @property
    def words(self) -> str:
        """For the page: the same on every machine."""
        if self.not_built:
            return f"not tried: {self.not_built[:120]}"
        if self.refusal:
            return f"refused: {re.sub(r'by [0-9.e+-]*[0-9]', 'by much', self.refusal)}"
        layers = "" if len(self.layers) == self.depth else f"; heads in {', '.join(map(str, self.layers))} alone"
        return f"{self.engine.replace('_', ' ')}{layers}"


@cache
def outcome(model_type: str) -> Outcome:
    """Open the model as ``open_model`` does, and compare what its engine measures."""
    try:
        model = tiny_model(model_type)
    except Exception as problem:  # whatever a config or a model class says of sizes that do not fit
        lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
        return Outcome(not_built=lines[-1] if lines else type(problem).__name__)
    ids, _ = prompts_of_different_length()
    try:
        engine, _ = choose_engine(plain_backbone(scale_up(model)), ids)
    except RelfvError as refusal:
        return Outcome(refusal=str(refusal))
    enough = (depth_of(model.state_dict()) or 0) >= text_config(model.config).num_hidden_layers
    return replace(_judged(engine, ids[:2]), has_layers_in_names=enough)


def _judged(engine: Engine, ids: list[list[int]]) -> Outcome:
    backbone = engine.backbone
    arch, plain = backbone.arch, backbone.plain().in_float32()
    layers, n_heads, width = [*arch.out_projs], arch.n_heads, arch.head_dim
    z = [_plain_heads(plain, prompt) for prompt in ids]  # per prompt (layer with heads, heads * width)
    base = [_plain(plain, prompt, []) for prompt in ids]
    targets = [int(logprobs.argmax()) for logprobs in base]
    prompts, heads = Prompts(ids, targets), [HeadId(layer, head) for layer in layers for head in range(n_heads)]
    values = 3.0 * torch.stack(z).flip(-1).mean(0).view(-1, width)  # a row for each head, in order
    vector = torch.randn(1, arch.resid_dim, generator=torch.Generator().manual_seed(2))
    swept = engine.sweep_heads(prompts, values, heads)
    injected = engine.inject(prompts, vector, range(arch.n_layers))
    true, rows = [], [*zip(heads, values, strict=True)]
    for prompt, target in zip(ids, targets, strict=True):
        patches = [(arch.out_projs[h.layer], True, _put(value, h.head * width)) for h, value in rows]
        adds = [(block, False, _add(vector[0])) for block in arch.blocks]
        true.append([float(_plain(plain, prompt, [edit])[target]) for edit in (*patches, *adds)])
    found = torch.cat([swept.edited.logprob, injected.edited.logprob], dim=1)
    before = torch.stack([logprobs[target] for logprobs, target in zip(base, targets, strict=True)])
    means = run_clean(backbone, prompts).activations[:, layers].flatten(2)
    scale = float(torch.stack(base).abs().max())
    gap = max(
        float((found - torch.tensor(true)).abs().max()),
        float((swept.base.logprob - before).abs().max()),
        scale * float((means - torch.stack(z)).abs().max() / torch.stack(z).abs().max()),
    )
    effect = float((torch.tensor(true) - before[:, None]).abs().max())
    return Outcome(engine.name, gap, rounding(scale, n=256), effect, tuple(layers), arch.n_layers)


def _plain(backbone: Backbone, prompt: list[int], edits: list[tuple[nn.Module, bool, Edit]]) -> torch.Tensor:
    """Log-probabilities after the prompt, by the model's own forward pass; an edit is of a module's input or output."""
    with ExitStack() as stack, backbone.running():
        for module, is_input, edit in edits:
            hook = module.register_forward_pre_hook if is_input else module.register_forward_hook
            handle = hook(_of_input(edit) if is_input else _of_output(edit), with_kwargs=True)
            stack.callback(handle.remove)
        logits = backbone.model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0, -1]
        return logits.float().log_softmax(-1).clone()


def _plain_heads(backbone: Backbone, prompt: list[int]) -> torch.Tensor:
    seen: list[torch.Tensor] = []

    def keep(z: torch.Tensor) -> torch.Tensor:
        seen.append(z[0, -1].float().clone())
        return z

    _plain(backbone, prompt, [(projection, True, keep) for projection in backbone.arch.out_projs.values()])
    return torch.stack(seen)


def _of_input(edit: Edit) -> Any:
    return lambda _, args, kwargs: ((edit(args[0]), *args[1:]), kwargs)


def _of_output(edit: Edit) -> Any:
    def hook(_: nn.Module, __: Any, ___: Any, output: Any) -> Any:
        return edit(output) if isinstance(output, torch.Tensor) else type(output)((edit(output[0]), *output[1:]))

    return hook


def _put(value: torch.Tensor, start: int) -> Edit:
    def edit(z: torch.Tensor) -> torch.Tensor:
        z = z.clone()
        z[0, -1, start : start + len(value)] = value
        return z

    return edit


def _add(vector: torch.Tensor) -> Edit:
    def edit(hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden.clone()
        hidden[0, -1] += vector
        return hidden

    return edit
