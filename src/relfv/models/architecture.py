"""The parts of an opened model: its blocks, attention output projections and vocabulary projection, and their sizes.

``resolve`` finds them (layout.py) and checks that their sizes fit each other.
What a family does beside the common form (scaled logits, soft caps, norms after attention) is read here as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from relfv.errors import InputError
from relfv.models.layout import find_layout
from relfv.models.notes import rounded_or_capped, what_lies_between
from relfv.models.packed import is_readable, weight_of

_UNSCALED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""dtypes of weights that can be multiplied as they are. A float8 weight has a scale, kept elsewhere in its module."""

_LOGIT_FACTORS = (
    ("cohere", "logit_scale", False),
    ("falcon_h1", "lm_head_multiplier", False),
    ("hyperclovax", "logits_scaling", False),
    ("granite", "logits_scaling", True),
    ("minicpm3", "logits_scaling", True),
)
"""Beginning of the ``model_type``, name of the factor in the config, and whether logits are divided by it."""


@dataclass(frozen=True)
class Architecture:
    """The parts of one opened model that relfv reads and edits."""

    family: str
    """The family of the checkpoint's ``model_type``, whichever name it was opened by: ``llama3`` for ``auto``,
    ``llama`` and ``llama3``; ``generic`` where no spec has the ``model_type``."""
    decoder: nn.Module
    """The text model without its vocabulary projection."""
    blocks: tuple[nn.Module, ...]
    attentions: Mapping[int, nn.Module]
    """Layer -> attention module: the one that holds the output projection."""
    out_projs: Mapping[int, nn.Module]
    """Layer -> attention output projection; its input is (..., n_heads * head_dim). Ascending; of a hybrid's layers
    only those with attention."""
    n_heads: int
    head_dim: int
    """Width of a head, from the projection's input width: hidden_size / n_heads is wrong for Gemma, Qwen3 and
    Mistral-Nemo."""
    resid_dim: int
    """Width of the residual stream."""
    intermediate_size: int
    """Width of the MLP, for memory estimates alone; 4 * resid_dim where the config has no name for it."""
    lm_head: nn.Module
    steady_up_to: int | None = None
    """Number of tokens beyond which rotary frequencies depend on the longest prompt of a batch (``dynamic``,
    ``longrope``). A prompt that is longer must neither share a batch nor be split into prefix and last token. None: no
    limit."""
    logit_scale: float = 1.0
    """The family's constant factor on the logits (Cohere, Granite, Falcon-H1 ...)."""
    logit_softcap: float | None = None
    """Cap c of c * tanh(logits / c) (Gemma 2, RecurrentGemma)."""
    attention_norms: Mapping[int, nn.Module] | None = None
    """Layer -> norm that attention's output goes through before it joins the residual stream (Gemma 2 and 3, OLMo 2,
    GLM-4), for each layer with attention; None where there is none."""
    residual_multiplier: float = 1.0
    """Factor on attention's output before it joins the residual stream (Granite)."""
    notes: tuple[str, ...] = field(default=())
    """Notes on this model for readers of the results; artifacts carry them."""

    @property
    def n_layers(self) -> int:
        """L, the number of blocks."""
        return len(self.blocks)

    @property
    def device(self) -> torch.device:
        """Device on which the model computes; streamed blocks have their weights there only while they run
        (streaming.py)."""
        return next(self.lm_head.parameters()).device

    @cached_property
    def largest_unit(self) -> int:
        """Parameters of the largest block, or of the vocabulary projection if that has more."""
        return max(sum(p.numel() for p in unit.parameters()) for unit in (*self.blocks, self.lm_head))

    def final_logits(self, raw: torch.Tensor) -> torch.Tensor:
        """Apply what the family does to ``lm_head``'s output: scale, then soft cap."""
        logits = raw if self.logit_scale == 1.0 else raw * self.logit_scale
        if self.logit_softcap is None:
            return logits
        return self.logit_softcap * torch.tanh(logits / self.logit_softcap)

    def project_head(self, layer: int, head: int, activation: torch.Tensor) -> torch.Tensor:
        """W_O[layer][:, slice of head] @ activation, without the output bias.

        (..., head_dim) -> float64 (..., resid_dim) on the CPU. The bias belongs to the layer and not to any head;
        adding it per head would count it k times.
        """
        return self.project_heads(layer, [head], activation[..., None, :]).cpu()

    def project_heads(self, layer: int, heads: Sequence[int], activations: torch.Tensor) -> torch.Tensor:
        """The sum of ``project_head`` over ``heads``: (..., head, head_dim), on the CPU -> float64 (..., resid_dim),
        on a CUDA device, which is not waited for, or else on the CPU."""
        projection = self.out_projs[layer]
        weight: Any = weight_of(projection) if is_readable(projection) else getattr(projection, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.dtype in _UNSCALED and weight.dim() == 2:
            inputs_first = weight.detach() if _is_conv1d(projection) else weight.detach().T
            by_head = inputs_first.unflatten(0, (self.n_heads, self.head_dim))
            columns = torch.cat([by_head[head] for head in heads])
            place = self.device if self.device.type == "cuda" else "cpu"  # not every device has float64
            columns = columns.to(place).double()
            return activations.flatten(-2).to(place, non_blocking=place != "cpu").double() @ columns
        if activations.dim() > 2:
            return torch.stack([self.project_heads(layer, heads, one) for one in activations])
        starts = [head * self.head_dim for head in heads]
        each = zip(starts, activations, strict=True)
        return torch.stack([self._project_through_module(projection, start, z) for start, z in each]).sum(0)

    def _project_through_module(self, projection: nn.Module, start: int, activation: torch.Tensor) -> torch.Tensor:
        """Project one head where the weight is packed in a way of its module's own: run the module, then subtract its
        bias."""
        width = self.n_heads * self.head_dim
        rows = torch.zeros(2, 1, width, device=self.device, dtype=torch.float32)
        rows[0, 0, start : start + self.head_dim] = activation.to(self.device)
        with torch.no_grad():
            out = projection(rows).cpu().double()
        return (out[0] - out[1])[0]


def resolve(model: Any, spec_name: str) -> Architecture:
    """Find the parts of ``model`` under ``spec_name``.

    Raises InputError if the spec is not the checkpoint's family, or the model has no heads of one size in its layers.
    """
    config = text_config(model.config)
    layout = find_layout(model, config, spec_name)
    blocks, paths = layout.blocks, layout.out_paths
    out_projs = {layer: blocks[layer].get_submodule(path) for layer, path in paths.items()}
    n_heads, head_dim = _head_sizes(model, config, out_projs)
    head = model.get_output_embeddings()
    if head is None:
        raise InputError(f"{type(model).__name__} has no output embeddings; relfv needs a causal language model")
    if next(head.parameters(), None) is None:  # as torch's own quantisation leaves them
        raise InputError(
            f"{type(model).__name__}: its output embeddings ({type(head).__name__}) hold no parameters; expected "
            "weights that are ordinary tensors, or packed by bitsandbytes (quant='8bit' or '4bit')"
        )
    resid_dim = _out_features(next(iter(out_projs.values())))
    norms = _attention_norms({layer: blocks[layer] for layer in paths})
    multiplier = float(getattr(config, "residual_multiplier", 1.0))
    return Architecture(
        family=layout.family,
        decoder=_decoder_of(model, blocks[0]),
        blocks=blocks,
        attentions={layer: blocks[layer].get_submodule(path.rpartition(".")[0]) for layer, path in paths.items()},
        out_projs=out_projs,
        n_heads=n_heads,
        head_dim=head_dim,
        resid_dim=resid_dim,
        intermediate_size=_intermediate_size(config, resid_dim),
        lm_head=head,
        steady_up_to=_steady_up_to(model, config),
        logit_scale=_logit_scale(config),
        logit_softcap=_logit_softcap(config),
        attention_norms=norms,
        residual_multiplier=multiplier,
        notes=(*layout.notes, *what_lies_between(norms, multiplier), *rounded_or_capped(model, config)),
    )


def text_config(config: Any) -> Any:
    """The language model's config: the config itself, or its text part in a multimodal wrapper."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _head_sizes(model: Any, config: Any, out_projs: Mapping[int, nn.Module]) -> tuple[int, int]:
    """Number of heads, and their width in the projections' input. Raises InputError unless all layers agree."""
    n_heads = getattr(config, "num_attention_heads", None)
    widths = {_in_features(projection) for projection in out_projs.values()}
    if not isinstance(n_heads, int) or len(widths) > 1 or max(widths) % n_heads:
        raise InputError(
            f"{type(model).__name__}: its attention output projections take inputs of width "
            f"{', '.join(map(str, sorted(widths)))} for {n_heads} heads; expected the same number of equal heads in "
            "all layers with attention"
        )
    return n_heads, max(widths) // n_heads


def _decoder_of(model: Any, block: nn.Module) -> nn.Module:
    """The innermost model around the blocks: embeddings, blocks and final norm, without vocabulary or images."""
    from transformers import PreTrainedModel

    around = [
        module
        for module in model.modules()
        if isinstance(module, PreTrainedModel) and any(part is block for part in module.modules())
    ]
    if not around or around[-1] is model:
        raise InputError(
            f"{type(model).__name__} has no inner model that holds its blocks but not its vocabulary projection; "
            "expected one, as in LlamaForCausalLM.model"
        )
    return around[-1]


def _is_conv1d(module: nn.Module) -> bool:
    """Whether the module is GPT-2's Conv1D, which keeps its weight as (in, out), the transpose of nn.Linear's."""
    return type(module).__name__ == "Conv1D"


def _in_features(module: nn.Module) -> int:
    return int(module.in_features) if hasattr(module, "in_features") else int(module.weight.shape[0])  # type: ignore


def _out_features(module: nn.Module) -> int:
    return int(module.out_features) if hasattr(module, "out_features") else int(module.weight.shape[1])  # type: ignore


def _intermediate_size(config: Any, resid_dim: int) -> int:
    sizes = [getattr(config, name, None) for name in ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")]
    return next((size for size in sizes if isinstance(size, int)), 4 * resid_dim)


def _steady_up_to(model: Any, config: Any) -> int | None:
    kinds: set[Any] = set()
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        kinds |= set(kind.values()) if isinstance(kind, dict) else {kind}
    if not kinds & {"dynamic", "longrope"}:
        return None
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    limits = [scaling.get("original_max_position_embeddings")]
    limits += [getattr(config, name, None) for name in ("original_max_position_embeddings", "max_position_embeddings")]
    return min(limit for limit in limits if isinstance(limit, int))


def _logit_scale(config: Any) -> float:
    for model_type, name, divides in _LOGIT_FACTORS:
        factor = getattr(config, name, None)
        if factor is not None and config.model_type.startswith(model_type):
            return 1.0 / float(factor) if divides else float(factor)
    return 1.0


def _attention_norms(blocks: Mapping[int, nn.Module]) -> dict[int, nn.Module] | None:
    """Layer -> norm on attention's output, recognised by a block's other norms: where there is none after the
    feed-forward part or by a name of its own, ``post_attention_layernorm`` is the norm *before* the feed-forward part
    (Llama). Judged on opening (engine/writing.py)."""
    one = next(iter(blocks.values()))
    if hasattr(one, "post_self_attn_layernorm"):
        name = "post_self_attn_layernorm"
    elif hasattr(one, "post_feedforward_layernorm"):
        name = "post_attention_layernorm"
    else:
        return None
    return {layer: block.get_submodule(name) for layer, block in blocks.items()}


def _logit_softcap(config: Any) -> float | None:
    names = ("final_logit_softcapping", "logits_soft_cap")
    return next((cap for name in names if (cap := getattr(config, name, None)) is not None), None)
