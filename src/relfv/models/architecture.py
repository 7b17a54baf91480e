"""The parts of an opened model: its blocks, attention output projections and vocabulary projection, and their sizes.

``resolve`` finds them by the family's paths (families.py), or by their shape where no spec knows the ``model_type``.
What a family does beside the common form (scaled logits, soft caps, norms after attention) is read here as well.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from relfv.errors import InputError
from relfv.models.families import FAMILIES, FamilySpec, family_name
from relfv.models.notes import rounded_or_capped, what_lies_between

_UNSCALED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""dtypes of weights that can be multiplied as they are. A float8 weight has a scale, kept elsewhere in its module."""

_OUT_PROJ_NAMES = ("o_proj", "out_proj", "c_proj", "dense", "wo")


@dataclass(frozen=True)
class Architecture:
    """The parts of one opened model that relfv reads and edits."""

    spec_name: str
    """The family whose paths fit, or ``generic`` where the blocks were found by their shape."""
    decoder: nn.Module
    """The text model without its vocabulary projection."""
    blocks: tuple[nn.Module, ...]
    attentions: tuple[nn.Module, ...]
    """Per layer the attention module: the one that holds the output projection."""
    out_projs: tuple[nn.Module, ...]
    """Per layer the attention output projection; its input is (..., n_heads * head_dim)."""
    n_heads: int
    head_dim: int
    """From the projection's input width: hidden_size / n_heads is wrong for Gemma, Qwen3 and Mistral-Nemo."""
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
    """The family's constant factor on the logits (Cohere, Granite)."""
    logit_softcap: float | None = None
    """Cap c of c * tanh(logits / c) (Gemma 2)."""
    attention_norms: tuple[nn.Module, ...] | None = None
    """Per layer the norm that what attention writes goes through before it joins the residual stream (Gemma 2 and 3,
    OLMo 2, GLM-4); None where there is none."""
    residual_multiplier: float = 1.0
    """What it is multiplied by on the way (Granite)."""
    notes: tuple[str, ...] = field(default=())
    """What a reader of the results should know about this model; artifacts carry it."""

    @property
    def n_layers(self) -> int:
        """L, the number of blocks."""
        return len(self.blocks)

    def final_logits(self, raw: torch.Tensor) -> torch.Tensor:
        """What the family does to ``lm_head``'s output: scale, then soft cap."""
        logits = raw if self.logit_scale == 1.0 else raw * self.logit_scale
        if self.logit_softcap is None:
            return logits
        return self.logit_softcap * torch.tanh(logits / self.logit_softcap)

    def project_head(self, layer: int, head: int, activation: torch.Tensor) -> torch.Tensor:
        """W_O[layer][:, slice of head] @ activation, without the output bias.

        (..., head_dim) -> float64 (..., resid_dim) on the CPU. The bias belongs to the layer and not to any head;
        adding it per head would count it k times.
        """
        projection = self.out_projs[layer]
        start = head * self.head_dim
        weight: Any = getattr(projection, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.dtype in _UNSCALED and weight.dim() == 2:
            transposed = _is_conv1d(projection)
            columns = weight.detach().narrow(0 if transposed else 1, start, self.head_dim)
            columns = (columns if columns.is_cuda else columns.cpu()).double()  # not every device has float64
            value = activation.to(columns.device).double()
            return (value @ (columns if transposed else columns.T)).cpu()
        if activation.dim() > 1:
            return torch.stack([self.project_head(layer, head, one) for one in activation])
        return self._project_through_module(projection, start, activation)

    def _project_through_module(self, projection: nn.Module, start: int, activation: torch.Tensor) -> torch.Tensor:
        """The same where the weight is packed or scaled (4 or 8 bit): run the module, then subtract its bias."""
        device = next(projection.parameters()).device
        width = self.n_heads * self.head_dim
        rows = torch.zeros(2, 1, width, device=device, dtype=torch.float32)
        rows[0, 0, start : start + self.head_dim] = activation.to(device)
        with torch.no_grad():
            out = projection(rows).cpu().double()
        return (out[0] - out[1])[0]


def resolve(model: Any, spec_name: str) -> Architecture:
    """Find the parts of ``model`` under ``spec_name``.

    Raises InputError if the spec does not fit the model, with the module that is missing and where it was expected.
    """
    config = text_config(model.config)
    spec, notes = _choose_spec(spec_name, config.model_type)
    if spec is None:
        blocks, out_path = _find_blocks(model, config)
    else:
        blocks, out_path = _blocks_of(model, spec, spec_name, config.model_type), spec.out_proj
    out_projs = tuple(
        _submodule(block, out_path, f"block {index} of {type(model).__name__}", spec_name, config.model_type)
        for index, block in enumerate(blocks)
    )
    n_heads = int(config.num_attention_heads)
    width = _in_features(out_projs[0])
    if width % n_heads or any(_in_features(projection) != width for projection in out_projs):
        raise InputError(
            f"{type(model).__name__}: the input of '{out_path}' is {width} wide, which {n_heads} heads do not divide "
            "evenly in every layer; relfv needs the same number of equal heads in all layers"
        )
    head = model.get_output_embeddings()
    if head is None:
        raise InputError(f"{type(model).__name__} has no output embeddings; relfv needs a causal language model")
    resid_dim = _out_features(out_projs[0])
    norms, multiplier = _attention_norms(blocks), float(getattr(config, "residual_multiplier", 1.0))
    return Architecture(
        spec_name=spec.name if spec else "generic",
        decoder=_decoder_of(model, blocks[0]),
        blocks=blocks,
        attentions=tuple(block.get_submodule(out_path.rpartition(".")[0]) for block in blocks),
        out_projs=out_projs,
        n_heads=n_heads,
        head_dim=width // n_heads,
        resid_dim=resid_dim,
        intermediate_size=_intermediate_size(config, resid_dim),
        lm_head=head,
        steady_up_to=_steady_up_to(model, config),
        logit_scale=_logit_scale(config),
        logit_softcap=getattr(config, "final_logit_softcapping", None),
        attention_norms=norms,
        residual_multiplier=multiplier,
        notes=(*notes, *what_lies_between(norms, multiplier), *rounded_or_capped(model, config)),
    )


def text_config(config: Any) -> Any:
    """The language model's config: the config itself, or its text part in a multimodal wrapper."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _choose_spec(name: str, model_type: str) -> tuple[FamilySpec | None, tuple[str, ...]]:
    """The spec, or None where ``auto`` knows none for this ``model_type``; and notes."""
    family = family_name(name, model_type)
    if family in FAMILIES:
        return FAMILIES[family], ()
    return None, (f"model_type {model_type!r} has no family spec; its blocks were found by their shape",)


def _blocks_of(model: Any, spec: FamilySpec, spec_name: str, model_type: str) -> tuple[nn.Module, ...]:
    for path in spec.blocks:
        try:
            blocks = model.get_submodule(path)
        except AttributeError:
            continue
        if isinstance(blocks, nn.ModuleList) and len(blocks):
            return tuple(blocks)
    raise _misfit(type(model).__name__, " or ".join(spec.blocks), model, spec_name, model_type)


def _submodule(root: nn.Module, path: str, where: str, spec_name: str, model_type: str) -> nn.Module:
    try:
        return root.get_submodule(path)
    except AttributeError:
        raise _misfit(where, path, root, spec_name, model_type) from None


def _misfit(where: str, missing: str, root: nn.Module, spec_name: str, model_type: str) -> InputError:
    children = ", ".join(name for name, _ in root.named_children()) or "no submodules"
    return InputError(
        f"--model_spec {spec_name!r} does not fit this model (its config says model_type {model_type!r}): "
        f"no module {missing!r} in {where}, which has {children}; use --model_spec auto or the model's own family"
    )


def _find_blocks(model: nn.Module, config: Any) -> tuple[tuple[nn.Module, ...], str]:
    """Without a spec: the outermost list with one entry per layer, and the path of its attention output projection."""
    depth = int(config.num_hidden_layers)
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    if not lists:
        raise InputError(
            f"{type(model).__name__} (model_type {config.model_type!r}): no list of {depth} blocks found; "
            f"name a family with --model_spec, one of {', '.join(FAMILIES)}"
        )
    name, blocks = min(lists, key=lambda item: item[0].count("."))
    for path, module in blocks[0].named_modules():
        parts = path.split(".")
        if parts[-1] in _OUT_PROJ_NAMES and any("att" in part for part in parts[:-1]) and not list(module.children()):
            return tuple(blocks), path
    raise InputError(
        f"{type(model).__name__}: no attention output projection ({', '.join(_OUT_PROJ_NAMES)}) in {name}.0; "
        f"name a family with --model_spec, one of {', '.join(FAMILIES)}"
    )


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
    """GPT-2's Conv1D keeps its weight as (in, out), the transpose of nn.Linear's."""
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
    """Cohere multiplies its logits by ``logit_scale``; Granite divides them by ``logits_scaling``."""
    if getattr(config, "logit_scale", None) is not None and config.model_type.startswith("cohere"):
        return float(config.logit_scale)
    if getattr(config, "logits_scaling", None) is not None and config.model_type.startswith("granite"):
        return 1.0 / float(config.logits_scaling)
    return 1.0


def _attention_norms(blocks: tuple[nn.Module, ...]) -> tuple[nn.Module, ...] | None:
    """Told by a block's other norms: where there is none after the feed-forward part or by a name of its own,
    ``post_attention_layernorm`` is the norm *before* the feed-forward part (Llama). Judged on opening
    (engine/writing.py)."""
    if hasattr(blocks[0], "post_self_attn_layernorm"):
        return tuple(block.get_submodule("post_self_attn_layernorm") for block in blocks)
    if hasattr(blocks[0], "post_feedforward_layernorm"):
        return tuple(block.get_submodule("post_attention_layernorm") for block in blocks)
    return None
