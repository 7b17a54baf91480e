"""Finding the blocks of an opened model, and those of them that have an attention output projection.

Paths come from the family's spec (families.py). Where there is none, or the modules are not where it says, they are
found by their shape: the outermost list with an entry for each layer and attention in some, and in each block the
attention's last linear layer. Hybrids (Jamba, Qwen3-Next, Bamba, LFM2 ...) have attention in some blocks, and in the
others recurrence, convolution or linear attention, which is a recurrence too: what is measured here is heads that
attend by softmax.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from relfv.errors import InputError
from relfv.models.families import FAMILIES, FamilySpec, family_name, family_of

_OUT_PROJ_NAMES = ("o_proj", "out_proj", "c_proj", "dense", "wo")
_NOT_SOFTMAX = ("linear", "delta", "lightning", "mamba", "recurrent")
"""Parts of the names of modules that mix tokens without softmax attention."""


@dataclass(frozen=True)
class Layout:
    """The blocks, and the attention output projection of those that have one."""

    family: str
    """The family of the checkpoint's ``model_type``, or ``generic`` where no spec has it."""
    blocks: tuple[nn.Module, ...]
    out_paths: dict[int, str]
    """Layer -> path of its output projection within the block, ascending; layers without attention are not there."""
    notes: tuple[str, ...]


def find_layout(model: Any, config: Any, spec_name: str) -> Layout:
    """The layout under ``spec_name``; ``config`` is the text model's.

    Raises InputError for an unknown spec, for one that is not the checkpoint's family, for a model without blocks or
    attention, and for one whose layers share an attention module.
    """
    spec, own = _choose_spec(spec_name, config.model_type)
    prefix = type(model).__name__.partition("For")[0]
    blocks, notes = _blocks_by_spec(model, spec), []
    if own is None:
        where = f"where {spec.name} has them" if spec and blocks else "by their shape"
        notes.append(f"model_type {config.model_type!r} has no family spec; its blocks were found {where}")
    elif blocks is None:
        notes.append(f"the blocks are not where family {own.name} has them; they were found by their shape")
    if blocks is None:
        blocks = _blocks_by_shape(model, config, prefix)
    found = _out_paths(blocks, spec, prefix)
    _require_attention_of_its_own(model, config, blocks, found)
    if len(found) < len(blocks):
        notes.append(
            f"attention heads are in layers {', '.join(map(str, found))} of 0 to {len(blocks) - 1}, the others have no "
            "attention: heads are measured there alone, and vectors injected after every layer"
        )
    return Layout(own.name if own else "generic", blocks, found, tuple(notes))


def _choose_spec(name: str, model_type: str) -> tuple[FamilySpec | None, FamilySpec | None]:
    """The spec whose paths are tried first, and the family of the checkpoint: None where no spec has its
    ``model_type``, and any spec may be named for its paths."""
    return FAMILIES.get(family_name(name, model_type)), family_of(model_type)


def _blocks_by_spec(model: Any, spec: FamilySpec | None) -> tuple[nn.Module, ...] | None:
    for path in spec.blocks if spec else ():
        try:
            blocks = model.get_submodule(path)
        except AttributeError:
            continue
        if isinstance(blocks, nn.ModuleList) and len(blocks):
            return tuple(blocks)
    return None


def _blocks_by_shape(model: nn.Module, config: Any, prefix: str) -> tuple[nn.Module, ...]:
    depth = int(config.num_hidden_layers)
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    if not lists:
        raise InputError(
            f"{_what(model, config)}: no list of {depth} blocks found; expected one with an entry for each of "
            "the layers that num_hidden_layers counts"
        )
    lists.sort(key=lambda item: (not _out_paths(item[1], None, prefix), item[0].count(".")))
    return tuple(lists[0][1])


def _out_paths(blocks: Iterable[nn.Module], spec: FamilySpec | None, prefix: str) -> dict[int, str]:
    paths = {layer: _out_path(block, spec, prefix) for layer, block in enumerate(blocks)}
    return {layer: path for layer, path in paths.items() if path is not None}


def _out_path(block: nn.Module, spec: FamilySpec | None, prefix: str) -> str | None:
    """Path of the block's attention output projection: the spec's, else the first leaf with a usual name inside a
    module that is softmax attention by its own name or its class's, without the family's (RecurrentGemma, KimiLinear);
    None if there is none."""
    modules = dict(block.named_modules())
    if spec and spec.out_proj in modules:
        return spec.out_proj
    for path, module in modules.items():
        parts = path.split(".")
        if parts[-1].lower() not in _OUT_PROJ_NAMES or list(module.children()):
            continue
        around = [".".join(parts[:end]) for end in range(1, len(parts))]
        classes = [type(modules[name]).__name__.removeprefix(prefix) for name in around]
        names = " ".join([*parts[:-1], *classes]).lower()
        if "att" in names and not any(word in names for word in _NOT_SOFTMAX):
            return path
    return None


def _require_attention_of_its_own(
    model: Any, config: Any, blocks: tuple[nn.Module, ...], out_paths: dict[int, str]
) -> None:
    if not out_paths:
        raise InputError(
            f"{_what(model, config)}: none of its {len(blocks)} layers has an attention output projection "
            f"({', '.join(_OUT_PROJ_NAMES)}, within attention), so there are no heads to measure; expected a model "
            "with softmax attention"
        )
    owner: dict[int, int] = {}
    for layer, path in out_paths.items():
        first = owner.setdefault(id(blocks[layer].get_submodule(path)), layer)
        if first != layer:
            raise InputError(
                f"{_what(model, config)}: its layers {first} and {layer} share one attention module, so that a head "
                "of one cannot be patched without the other's; expected layers with attention of their own"
            )


def _what(model: Any, config: Any) -> str:
    return f"{type(model).__name__} (model_type {config.model_type!r})"
