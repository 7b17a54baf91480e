"""Paths of the parts of each model family: plain data, without torch.

A family is named by ``--model_spec`` or, with ``auto``, by the ``model_type`` of the checkpoint's config; never by
the checkpoint's name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from relfv.errors import InputError


@dataclass(frozen=True)
class FamilySpec:
    """Module paths of one family."""

    name: str
    model_types: tuple[str, ...]
    """``model_type`` values, of the text model's config, that ``auto`` maps to this spec."""
    blocks: tuple[str, ...] = ("model.layers", "model.language_model.layers", "language_model.model.layers")
    """Paths of the list of blocks, the first that exists counts: a text model's, then those in multimodal wrappers."""
    out_proj: str = "self_attn.o_proj"
    """Path, within a block, of the attention output projection: its *input* is the heads' outputs, concatenated."""


def _spec(name: str, *model_types: str, **paths: Any) -> FamilySpec:
    return FamilySpec(name, model_types, **paths)


_GPT2_BLOCKS = ("transformer.h",)

_SPECS = (
    _spec("llama3", "llama"),  # of two specs with one model_type, auto takes the first
    _spec("llama", "llama"),
    _spec("mistral", "mistral", "ministral", "mixtral"),
    _spec("qwen2", "qwen2", "qwen2_moe", "qwen2_vl_text", "qwen2_5_vl_text"),
    _spec("qwen3", "qwen3", "qwen3_moe"),
    _spec("gemma", "gemma", "gemma2", "gemma3_text"),
    _spec("olmo", "olmo", "olmo2", "olmo3", "olmoe"),
    _spec("phi3", "phi3"),
    _spec("phi", "phi", out_proj="self_attn.dense"),
    _spec("cohere", "cohere", "cohere2"),
    _spec("granite", "granite"),
    _spec("starcoder2", "starcoder2"),
    _spec("stablelm", "stablelm"),
    _spec("smollm3", "smollm3"),
    _spec("glm4", "glm4"),
    _spec("gpt_oss", "gpt_oss"),
    _spec("opt", "opt", blocks=("model.decoder.layers",), out_proj="self_attn.out_proj"),
    _spec("gpt2", "gpt2", blocks=_GPT2_BLOCKS, out_proj="attn.c_proj"),
    _spec("gpt_bigcode", "gpt_bigcode", blocks=_GPT2_BLOCKS, out_proj="attn.c_proj"),
    _spec("gptj", "gptj", blocks=_GPT2_BLOCKS, out_proj="attn.out_proj"),
    _spec("codegen", "codegen", blocks=_GPT2_BLOCKS, out_proj="attn.out_proj"),
    _spec("gpt_neo", "gpt_neo", blocks=_GPT2_BLOCKS, out_proj="attn.attention.out_proj"),
    _spec("falcon", "falcon", blocks=_GPT2_BLOCKS, out_proj="self_attention.dense"),
    _spec("bloom", "bloom", blocks=_GPT2_BLOCKS, out_proj="self_attention.dense"),
    _spec("neox", "gpt_neox", blocks=("gpt_neox.layers",), out_proj="attention.dense"),
)

FAMILIES: dict[str, FamilySpec] = {spec.name: spec for spec in _SPECS}
SPEC_NAMES: tuple[str, ...] = ("auto", *FAMILIES)


def family_of(model_type: str) -> FamilySpec | None:
    """The family that ``auto`` means for a checkpoint of this ``model_type``; None if no spec has it."""
    return next((spec for spec in FAMILIES.values() if model_type in spec.model_types), None)


def family_name(asked: str, model_type: str) -> str:
    """The family of a checkpoint with this ``model_type`` where the user asked for ``asked``: a name, or ``auto``.

    ``auto`` stays where no spec describes the checkpoint; there a named family is taken at its word. Raises InputError
    for a name that is unknown, or another family's.
    """
    if asked not in SPEC_NAMES:
        raise InputError(f"--model_spec {asked!r}: unknown family; expected one of {', '.join(SPEC_NAMES)}")
    own = family_of(model_type)
    if own is None:
        return asked
    if asked != "auto" and model_type not in FAMILIES[asked].model_types:
        right = " or ".join(spec.name for spec in FAMILIES.values() if model_type in spec.model_types)
        raise InputError(
            f"--model_spec {asked!r} does not fit this checkpoint, whose config says model_type {model_type!r}; "
            f"expected {right}: use --model_spec {own.name}, or auto"
        )
    return own.name
