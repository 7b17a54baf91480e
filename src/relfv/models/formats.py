"""Checkpoints whose weights are stored packed in few bits, and ``--quant``, which packs them on opening.

transformers knows the formats, what each needs, and which of them it can unpack while it reads: those become ordinary
weights, on any device and at any precision. The others are used through their own code.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from relfv.errors import InputError, first_line
from relfv.models.architecture import text_config
from relfv.models.packed import is_opaque, is_readable, weight_dtype

log = logging.getLogger(__name__)

GGUF = "gguf"
"""The format of GGUF files; what reads them is transformers itself, with the package of that name."""


def format_of(config: Any) -> str | None:
    """The name of the format that a checkpoint's config says its weights are packed in; None for ordinary ones."""
    stated = _stated(config)
    found = stated.get("quant_method") if isinstance(stated, dict) else getattr(stated, "quant_method", None)
    return None if stated is None else str(getattr(found, "value", found))


def unpacks(config: Any) -> bool:
    """Whether transformers unpacks such a checkpoint's packed weights while it reads them."""
    return format_of(config) == GGUF or unpacking(config) is not None


def unpacking(config: Any) -> dict[str, Any] | None:
    """Settings for packed weights in a checkpoint's config, and in them that transformers shall unpack the weights
    while it reads them; None where they are ordinary ones, or of a format that it does not unpack."""
    stated = _stated(config)
    if not isinstance(stated, dict) or not hasattr(as_object(stated), "dequantize"):
        return None
    return {**stated, "dequantize": True}


def as_object(stated: dict[str, Any]) -> Any:
    """transformers' object for what a config says of packed weights; None for a format that it does not know."""
    from transformers.quantizers.auto import AutoQuantizationConfig

    try:
        return AutoQuantizationConfig.from_dict(stated)
    except Exception as problem:  # a format that is not known, which ``require_format`` names
        log.debug("no quantisation config: %s", problem)
        return None


def require_format(name: str, config: Any, place: torch.device, quant: str) -> None:
    """Raise InputError, before any weight is read, for weights that are to be packed but are already, and for packed
    ones that transformers cannot read on ``place``: it knows which package and which device each format needs."""
    kind = format_of(config)
    if kind is not None and quant != "none":
        raise InputError(f"--quant {quant}: the weights of {name!r} are packed already ({kind}); use --quant none")
    if quant != "none":
        quantization(quant, place)
    if kind in (None, GGUF):
        return
    from transformers.quantizers.auto import AutoHfQuantizer

    try:
        quantizer = AutoHfQuantizer.from_config(unpacking(config) or _stated(config), pre_quantized=True)
        quantizer.validate_environment(device_map={"": str(place)}, weights_only=True)
    except Exception as problem:  # of many kinds: a package, a device or a format that is not there
        raise InputError(
            f"--model {name!r}: its weights are packed ({kind}), and what reads them is missing on {place}: "
            f"{first_line(problem)}"
        ) from problem


def quantization(quant: str, place: torch.device) -> Any:
    """The config for bitsandbytes. Raises InputError where that is not installed or knows no such device."""
    # It would warn that a package is missing which speeds up products of its own; relfv does not use those.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        import bitsandbytes  # type: ignore[import-not-found]
    except ImportError:
        raise InputError(
            f"--quant {quant}: needs bitsandbytes, which is not installed; run: pip install 'relfv[quant]'"
        ) from None
    from transformers import BitsAndBytesConfig

    known = getattr(bitsandbytes, "supported_torch_devices", {"cuda"})
    if place.type not in known:
        raise InputError(
            f"--quant {quant}: this bitsandbytes runs on {', '.join(sorted(known))}, and this run is on {place}; use "
            "--quant none"
        )
    if quant == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


def packing_note(model: Any, kind: str | None) -> tuple[str, ...]:
    """Notes for readers of the results on weights that are packed, or were stored so, as ``kind``."""
    if kind is None:
        return ()
    linear = next((module for module in model.modules() if is_readable(module)), None)
    if linear is not None:
        return (
            f"linear layers are packed by {kind} and read in {str(weight_dtype(linear)).removeprefix('torch.')} while "
            "they run; activations are not rounded, as the package's own products would do",
        )
    left = getattr(model.config, "quantization_config", None)  # none where transformers has unpacked all
    if is_opaque(model) or not (kind == GGUF or left is None or getattr(left, "dequantize", False)):
        return (f"weights are packed ({kind}) and multiplied by that format's own code, in its own precision",)
    dtype = str(next(p.dtype for p in model.parameters())).removeprefix("torch.")
    return (f"weights are stored packed ({kind}) and were unpacked to {dtype} on opening; activations are not rounded",)


def _stated(config: Any) -> Any:
    """The quantisation config, of the whole checkpoint or of its text model."""
    return getattr(config, "quantization_config", None) or getattr(text_config(config), "quantization_config", None)
