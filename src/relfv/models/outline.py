"""A model without its weights: what can be known of it in a moment, whatever its size."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relfv.errors import RelfvError
from relfv.models.adapters import adapter_in, require_peft
from relfv.models.architecture import Architecture, resolve
from relfv.models.cards import counts_foreseen
from relfv.models.context import Context, context_of
from relfv.models.devices import choose_devices
from relfv.models.formats import format_of, require_format, unpacks
from relfv.models.gguf import DTYPE
from relfv.models.kinds import model_class
from relfv.models.opening import quiet_transformers, torch_dtype
from relfv.models.placement import Placement, foreseen, sketch
from relfv.models.sources import location, model_source, snapshot, weights_source

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outline:
    """A model's parts, with shapes and without numbers."""

    name: str
    arch: Architecture
    context: Context
    n_embeddings: int
    """Number of token ids that the model knows."""
    n_parameters: int
    placement: Placement | None
    """Placement of the model's weights once it is opened; None where nothing streams."""
    stored: str
    """How the weights are stored, where that is packed in few bits."""
    packed_bytes: int
    """Bytes that the weights take where they stay as stored; 0 where they are unpacked, or ordinary ones."""


def outline(
    name: str, spec: str, *, revision: str, device: str, dtype: str, quant: str, offload: str, trust_remote_code: bool
) -> Outline | None:
    """The model that ``open_model`` would open, built from its config alone; None where only its weights can tell.

    Raises InputError for a device that is not there, a config that cannot be read, or a spec that does not fit it.
    """
    places = choose_devices(device)
    place = places[0]
    if adapter := adapter_in(model_source(name)):
        require_peft(adapter)
    source, commit = weights_source(name, revision)
    place_of, origin = location(source, commit)
    dtype = DTYPE if dtype == "auto" and "gguf_file" in origin else dtype
    with quiet_transformers():
        kind, config = model_class(place_of, name, {**origin, "trust_remote_code": trust_remote_code})
        placement = foreseen(
            name, spec, snapshot(source, commit), kind, config, offload=offload, device=place, dtype=torch_dtype(dtype),
            quant=quant, trust_remote_code=trust_remote_code,
        ) if len(places) == 1 else None  # fmt: skip
        if len(places) > 1:
            counts_foreseen(
                name, spec, kind, config, places, offload=offload, dtype=torch_dtype(dtype), quant=quant,
                trust_remote_code=trust_remote_code,
            )  # fmt: skip
        require_format(name, config, place, quant)
        model = sketch(kind, config, trust_remote_code=trust_remote_code)
    if model is None:
        return None
    try:
        arch = resolve(model, spec)
    except RelfvError:
        raise
    except Exception as problem:  # something asks for the numbers
        log.debug("no outline of %s: %s", name, problem)
        return None
    return Outline(
        name,
        arch,
        context_of(model.config),
        model.get_input_embeddings().weight.shape[0],
        sum(parameter.numel() for parameter in model.parameters()),
        placement,
        *_as_stored(config, snapshot(source, commit)),
    )


def _as_stored(config: Any, folder: Path) -> tuple[str, int]:
    kind = format_of(config)
    if kind is None or unpacks(config):
        return f"stored as {kind} and unpacked on opening" if kind else "", 0
    sizes = (file.stat().st_size for pattern in ("*.safetensors", "*.bin") for file in folder.glob(pattern))
    return f"as {kind} stores them", sum(sizes)
