"""Where each model family keeps its parts. The only module that knows one family from another.

A family is named by ``--model_spec`` or, with ``auto``, by the ``model_type`` of the checkpoint's config; never by
the checkpoint's name. Each spec says where the blocks are and which module of a block is the output projection of
attention, whose *input* is the concatenation of the heads' outputs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from relfv.errors import InputError


@dataclass(frozen=True)
class FamilySpec:
    """Module paths of one family."""

    name: str
    model_types: tuple[str, ...]
    """``model_type`` values, of the text model's config, that ``auto`` maps to this spec."""
    blocks: tuple[str, ...]
    """Paths of the list of blocks, first match counts (bare text model, then inside a multimodal wrapper)."""
    out_proj: str
    """Path of the attention output projection within a block."""


_DECODER = ("model.layers", "model.language_model.layers", "language_model.model.layers")
_GPT2_LIKE = ("transformer.h",)

_SPECS = (
    FamilySpec("llama3", ("llama",), _DECODER, "self_attn.o_proj"),
    FamilySpec("llama", ("llama",), _DECODER, "self_attn.o_proj"),
    FamilySpec("mistral", ("mistral", "ministral", "mixtral"), _DECODER, "self_attn.o_proj"),
    FamilySpec("qwen2", ("qwen2", "qwen2_moe", "qwen2_vl_text", "qwen2_5_vl_text"), _DECODER, "self_attn.o_proj"),
    FamilySpec("qwen3", ("qwen3", "qwen3_moe"), _DECODER, "self_attn.o_proj"),
    FamilySpec(
        "gemma",
        ("gemma", "gemma2", "gemma3_text"),
        _DECODER,
        "self_attn.o_proj",
    ),
    FamilySpec("olmo", ("olmo", "olmo2", "olmo3", "olmoe"), _DECODER, "self_attn.o_proj"),
    FamilySpec("phi3", ("phi3",), _DECODER, "self_attn.o_proj"),
    FamilySpec("phi", ("phi",), _DECODER, "self_attn.dense"),
    FamilySpec("cohere", ("cohere", "cohere2"), _DECODER, "self_attn.o_proj"),
    FamilySpec("granite", ("granite",), _DECODER, "self_attn.o_proj"),
    FamilySpec("starcoder2", ("starcoder2",), _DECODER, "self_attn.o_proj"),
    FamilySpec("stablelm", ("stablelm",), _DECODER, "self_attn.o_proj"),
    FamilySpec("smollm3", ("smollm3",), _DECODER, "self_attn.o_proj"),
    FamilySpec("glm4", ("glm4",), _DECODER, "self_attn.o_proj"),
    FamilySpec("gpt_oss", ("gpt_oss",), _DECODER, "self_attn.o_proj"),
    FamilySpec("opt", ("opt",), ("model.decoder.layers",), "self_attn.out_proj"),
    FamilySpec("gpt2", ("gpt2",), _GPT2_LIKE, "attn.c_proj"),
    FamilySpec("gpt_bigcode", ("gpt_bigcode",), _GPT2_LIKE, "attn.c_proj"),
    FamilySpec("gptj", ("gptj",), _GPT2_LIKE, "attn.out_proj"),
    FamilySpec("codegen", ("codegen",), _GPT2_LIKE, "attn.out_proj"),
    FamilySpec("gpt_neo", ("gpt_neo",), _GPT2_LIKE, "attn.attention.out_proj"),
    FamilySpec("falcon", ("falcon",), _GPT2_LIKE, "self_attention.dense"),
    FamilySpec("bloom", ("bloom",), _GPT2_LIKE, "self_attention.dense"),
    FamilySpec("neox", ("gpt_neox",), ("gpt_neox.layers",), "attention.dense"),
)

FAMILIES: dict[str, FamilySpec] = {spec.name: spec for spec in _SPECS}
SPEC_NAMES: tuple[str, ...] = ("auto", *FAMILIES)

_PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Weights that are what they say. A float8 weight is not: its scale lies elsewhere, so its module must do the product."""

_OUT_PROJ_NAMES = ("o_proj", "out_proj", "c_proj", "dense", "wo")


@dataclass(frozen=True)
class Architecture:
    """The parts of one opened model that relfv reads and edits."""

    spec_name: str
    """The family that fitted, or ``generic`` where the blocks were found by their shape."""
    decoder: nn.Module
    """The text model without its vocabulary projection."""
    blocks: tuple[nn.Module, ...]
    attentions: tuple[nn.Module, ...]
    """Per layer the attention module: the one that holds the output projection."""
    out_projs: tuple[nn.Module, ...]
    """Per layer the attention output projection; its input is (..., n_heads * head_dim)."""
    n_heads: int
    head_dim: int
    """From the projection's own input width: hidden_size / n_heads is wrong for Gemma, Qwen3 and Mistral-Nemo."""
    resid_dim: int
    lm_head: nn.Module
    steady_up_to: int | None = None
    """Tokens beyond which rotary frequencies depend on the longest text of a call (``dynamic``, ``longrope``): a prefix and
    its last token, or prompts of different length, must not be split or batched there. None: never."""
    logit_scale: float = 1.0
    """The family's constant factor on the logits (Cohere, Granite)."""
    logit_softcap: float | None = None
    """Cap c of c * tanh(logits / c) (Gemma 2)."""
    notes: tuple[str, ...] = field(default=())

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
        """W_O[layer][:, slice of head] @ activation, without the output bias: (..., head_dim) -> float64 (..., resid_dim).

        The bias belongs to the layer and not to any head; adding it per head would count it k times.
        """
        projection = self.out_projs[layer]
        start = head * self.head_dim
        weight: Any = getattr(projection, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.dtype in _PLAIN and weight.dim() == 2:
            transposed = _is_conv1d(projection)
            columns = weight.detach().narrow(0 if transposed else 1, start, self.head_dim)
            columns = (columns if columns.is_cuda else columns.cpu()).double()  # not every device has float64
            value = activation.to(columns.device).double()
            return (value @ (columns if transposed else columns.T)).cpu()
        if activation.dim() > 1:
            return torch.stack([self.project_head(layer, head, one) for one in activation])
        return self._project_through_module(projection, start, activation)

    def _project_through_module(self, projection: nn.Module, start: int, activation: torch.Tensor) -> torch.Tensor:
        """The same product where the weight is packed (8 or 4 bit): run the module and take its bias off again."""
        device = next(projection.parameters()).device
        width = self.n_heads * self.head_dim
        rows = torch.zeros(2, 1, width, device=device, dtype=torch.float32)
        rows[0, 0, start : start + self.head_dim] = activation.to(device)
        with torch.no_grad():
            out = projection(rows).cpu().double()
        return (out[0] - out[1])[0]


def resolve(model: Any, spec_name: str) -> Architecture:
    """Find the parts of ``model`` under ``spec_name``.

    Raises InputError that names the module that is missing, and where, if the spec does not fit the model.
    """
    config = text_config(model.config)
    spec, notes = _choose_spec(spec_name, config.model_type)
    if spec is None:
        blocks, out_path = _find_blocks(model, config)
        resolved_name = "generic"
    else:
        blocks = _blocks_of(model, spec, spec_name, config.model_type)
        out_path = spec.out_proj
        resolved_name = spec.name
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
    return Architecture(
        spec_name=resolved_name,
        decoder=_decoder_of(model, blocks[0]),
        blocks=tuple(blocks),
        attentions=tuple(block.get_submodule(out_path.rpartition(".")[0]) for block in blocks),
        out_projs=out_projs,
        n_heads=n_heads,
        head_dim=width // n_heads,
        resid_dim=_out_features(out_projs[0]),
        lm_head=head,
        steady_up_to=_steady_up_to(model, config),
        logit_scale=_logit_scale(config),
        logit_softcap=getattr(config, "final_logit_softcapping", None),
        notes=(*notes, *_what_lies_between(blocks[0], config)),
    )


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


def _what_lies_between(block: nn.Module, config: Any) -> tuple[str, ...]:
    """Some families scale or norm what attention writes before it joins the residual stream."""
    norms = ("post_feedforward_layernorm", "post_self_attn_layernorm")
    scale = getattr(config, "residual_multiplier", 1.0)
    if scale == 1.0 and not any(hasattr(block, name) for name in norms):
        return ()
    what = f"multiplies by {scale}" if scale != 1.0 else "norms"
    return (
        f"this family {what} what attention writes before adding it to the residual stream; the function vector is W_O "
        "times the mean activation, as defined, without that step, so alpha = 1 is not the heads' natural size here",
    )


def text_config(config: Any) -> Any:
    """The language model's config: the config itself, or its text part in a multimodal wrapper."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _decoder_of(model: Any, block: nn.Module) -> nn.Module:
    """The innermost model around the blocks: embeddings, blocks and final norm, without vocabulary or images."""
    from transformers import PreTrainedModel

    around = [
        module
        for module in model.modules()
        if isinstance(module, PreTrainedModel) and any(part is block for part in module.modules())
    ]
    if not around or around[-1] is model:
        raise InputError(f"{type(model).__name__} has no decoder of its own around its blocks; it cannot be driven")
    return around[-1]


def _choose_spec(name: str, model_type: str) -> tuple[FamilySpec | None, tuple[str, ...]]:
    if name != "auto":
        if name not in FAMILIES:
            raise InputError(f"--model_spec {name!r}: unknown family; expected one of {', '.join(SPEC_NAMES)}")
        return FAMILIES[name], ()
    for spec in _SPECS:
        if model_type in spec.model_types:
            return spec, ()
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
    found = ", ".join(name for name, _ in root.named_children()) or "no submodules"
    return InputError(
        f"--model_spec {spec_name!r} does not fit this model (its config says model_type {model_type!r}): "
        f"no module {missing!r} in {where}, which has {found}; use --model_spec auto or the model's own family"
    )


def _find_blocks(model: nn.Module, config: Any) -> tuple[tuple[nn.Module, ...], str]:
    """The spec's fallback: the top-level list with one entry per layer, and its attention output projection."""
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


def _is_conv1d(module: nn.Module) -> bool:
    """GPT-2's Conv1D keeps its weight as (in, out), the transpose of nn.Linear's."""
    return type(module).__name__ == "Conv1D"


def _in_features(module: nn.Module) -> int:
    return int(module.in_features) if hasattr(module, "in_features") else int(module.weight.shape[0])  # type: ignore


def _out_features(module: nn.Module) -> int:
    return int(module.out_features) if hasattr(module, "out_features") else int(module.weight.shape[1])  # type: ignore


def _logit_scale(config: Any) -> float:
    """Cohere multiplies its logits by ``logit_scale``; Granite divides them by ``logits_scaling``."""
    if getattr(config, "logit_scale", None) is not None and config.model_type.startswith("cohere"):
        return float(config.logit_scale)
    if getattr(config, "logits_scaling", None) is not None and config.model_type.startswith("granite"):
        return 1.0 / float(config.logits_scaling)
    return 1.0
