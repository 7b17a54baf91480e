"""Open a causal language model: load its tokenizer and weights, and find its parts.

The demo model, a local folder, a model in the Hugging Face cache and one on the hub (sources.py) all go through
``from_pretrained`` of transformers' auto classes; an adapter (adapters.py) is merged into its base model. Code from a
checkpoint is never run unless the user says ``--trust_remote_code``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from relfv.errors import InputError
from relfv.models.adapters import adapter_in, merged, require_peft
from relfv.models.architecture import Architecture, resolve, text_config
from relfv.models.cards import Cards, counts_foreseen, spread
from relfv.models.devices import choose_devices
from relfv.models.memory import fits_widened
from relfv.models.placement import foreseen
from relfv.models.size import check_size
from relfv.models.sources import dtype_name, hub_commit, model_source, snapshot, unreadable, weights_source
from relfv.models.streaming import Streaming, stream
from relfv.models.tokens import Tokens

log = logging.getLogger(__name__)

_MOST_LAYERS = 2000
"""Several times what the deepest language models have."""
_BUILT_IN = ("eager", "sdpa", "flex_attention", "grouped_mm", "batched_mm")
"""Ways to compute attention and experts whose code is in PyTorch and transformers themselves."""


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model, its tokenizer and its parts."""

    model: Any
    """The transformers model, in eval mode, without gradients."""
    tokens: Tokens
    arch: Architecture
    device: torch.device
    dtype: str
    """dtype of the stored weights, e.g. ``bfloat16``."""
    streaming: Streaming | None = None
    """The blocks whose weights are on the device only while they run; None where all weights always are."""
    cards: Cards | None = None
    """Where the blocks are, if on several cards; ``device`` is then the first."""


def load_checkpoint(
    name: str,
    spec: str,
    *,
    revision: str,
    device: str,
    dtype: str,
    quant: str,
    offload: str,
    exact: bool,
    trust_remote_code: bool,
) -> Checkpoint:
    """Load tokenizer and weights, and find the model's parts under ``spec``.

    ``exact``: 4-bit layers compute in float32, and on a CPU that has the memory, weights of 16 bits are held in
    float32: the same numbers, which need not be widened again for every pass. Raises InputError if the model cannot be
    found or read, the spec does not fit it, or the device cannot do what is asked.
    """
    places = choose_devices(device)
    place = places[0]
    adapter = adapter_in(model_source(name))
    if adapter:
        require_peft(adapter)
        if quant != "none":
            raise InputError(f"--model {name!r}: an adapter cannot be merged into packed weights; use --quant none")
    source, asked = weights_source(name, revision)
    origin: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if not Path(source).is_dir():
        origin["revision"] = hub_commit(source, asked)
    with quiet_transformers():
        # first, or its errors would be blamed on the tokenizer, which reads it, too
        kind, config = model_class(source, name, origin)
        check_size(name, source, text_config(config), place, torch_dtype(dtype))
        placement = foreseen(
            name, spec, snapshot(source, asked), kind, config, offload=offload, device=place, dtype=torch_dtype(dtype),
            quant=quant, trust_remote_code=trust_remote_code,
        ) if len(places) == 1 else None  # fmt: skip
        counts = counts_foreseen(
            name, spec, kind, config, places, offload=offload, dtype=torch_dtype(dtype), quant=quant,
            trust_remote_code=trust_remote_code,
        ) if len(places) > 1 else []  # fmt: skip
        loaded_on = torch.device("cpu") if counts or (placement and placement.streams) else place
        if adapter and adapter.has_tokenizer:
            tokenizer = _load_tokenizer(str(adapter.folder), name, {"trust_remote_code": trust_remote_code})
        else:
            tokenizer = _load_tokenizer(source, name, origin)
        compute = torch.float32 if exact else torch.bfloat16
        model = _load_weights(kind, source, name, loaded_on, dtype, quant, compute, origin)
    if adapter:
        model = merged(model, adapter, loaded_on).eval().requires_grad_(False)
    arch = resolve(model, spec)
    if adapter:
        arch = replace(arch, notes=(*arch.notes, adapter.note))
    for note in arch.notes:
        log.warning("%s", note)
    stored = next(p.dtype for p in model.parameters() if p.is_floating_point())
    streaming = stream(model, arch, placement, place) if placement and placement.streams else None
    cards = spread(model, arch, counts, places) if counts else None
    if streaming or cards:
        log.info("weights: %s", placement or cards)
    elif exact and place.type == "cpu" and stored.itemsize == 2 and not _is_packed(model) and fits_widened(model):
        model.float()
    tokens = Tokens(tokenizer, n_embeddings=model.get_input_embeddings().weight.shape[0])
    return Checkpoint(model, tokens, arch, place, str(stored).removeprefix("torch."), streaming, cards)


def load_tokenizer(name: str, revision: str, *, trust_remote_code: bool) -> Tokens:
    """The tokenizer alone, of a model that ``load_checkpoint`` would open. Raises InputError as that does."""
    adapter = adapter_in(model_source(name))
    of_adapter = str(adapter.folder) if adapter and adapter.has_tokenizer else None
    source, asked = (of_adapter, None) if of_adapter else weights_source(name, revision)
    origin: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if not Path(source).is_dir():
        origin["revision"] = hub_commit(source, asked)
    with quiet_transformers():
        return Tokens(_load_tokenizer(source, name, origin))


def _is_packed(model: Any) -> bool:
    return getattr(model, "hf_quantizer", None) is not None


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """While open, transformers shows no warnings and no progress bars.

    It would print a table of missing and unexpected tensors; ``_require_whole`` says what matters of it in one line.
    """
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    before = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(before)


def _load_tokenizer(source: str, name: str, origin: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, **origin)
    except Exception as problem:  # of many kinds in transformers, and all mean that the user's model is unreadable
        raise unreadable(name, "tokenizer", problem) from problem


def _load_weights(
    kind: Any,
    source: str,
    name: str,
    place: torch.device,
    dtype: str,
    quant: str,
    quant_compute: torch.dtype,
    origin: dict[str, Any],
) -> Any:
    options: dict[str, Any] = {"torch_dtype" if _old_transformers() else "dtype": torch_dtype(dtype) or "auto"}
    options["device_map"] = {"": str(place)}
    if quant != "none":
        options["quantization_config"] = quantization(quant, place, quant_compute)
    # For tensors that are missing or of another shape transformers draws random ones, with a warning at most.
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        model, loading_info = kind.from_pretrained(source, **origin, **options)
    except torch.OutOfMemoryError:
        raise InputError(
            f"--model {name!r} does not fit on {place}; use --dtype bf16, --quant 8bit or 4bit, or a larger device"
        ) from None
    except Exception as problem:  # of many kinds: missing, damaged or unknown weights
        raise unreadable(name, "model", problem) from problem
    _require_whole(name, loading_info)
    if getattr(text_config(model.config), "attn_logit_softcapping", None) is not None:
        # SDPA has no soft cap (Gemma 2); some releases of transformers use SDPA all the same and drop the cap.
        model.set_attn_implementation("eager")
    return model.eval().requires_grad_(False)


def _require_whole(name: str, loading_info: Any) -> None:
    """Raise InputError for a checkpoint that lacks tensors of its model, or has them in another shape."""
    missing = sorted(map(str, loading_info["missing_keys"]))
    mismatched = sorted(str(key if isinstance(key, str) else key[0]) for key in loading_info["mismatched_keys"])
    for keys, what in ((missing, "missing from its weights"), (mismatched, "of another shape than its config says")):
        if keys:
            raise InputError(
                f"--model {name!r}: {len(keys)} tensor(s) {what}, such as {keys[0]!r}; "
                "expected weights that are whole and made for this config, so fetch or copy the model again"
            )
    if unexpected := sorted(map(str, loading_info["unexpected_keys"])):
        unused = "%s: %d tensor(s) in its weights have no place in the model and were ignored, such as %r"
        log.warning(unused, name, len(unexpected), unexpected[0])


def model_class(source: str, name: str, origin: dict[str, Any]) -> tuple[Any, Any]:
    """transformers' class for a causal language model, or for a multimodal one, of which relfv uses the text model; and
    the model's config.

    Raises InputError for any other kind of model, such as an encoder, with or without a decoder, and for a config that
    asks for more layers than any model has, or for code from elsewhere that the user has not agreed to.
    """
    import transformers
    from transformers.models.auto import modeling_auto as known

    try:
        config = transformers.AutoConfig.from_pretrained(source, **origin)
    except Exception as problem:  # of many kinds: missing, damaged, or in need of code from the checkpoint
        raise unreadable(name, "config", problem) from problem
    _require_sane(name, config, trusted=origin["trust_remote_code"])
    brings_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if config.model_type in known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or brings_code:
        return transformers.AutoModelForCausalLM, config
    if config.model_type in known.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and not config.is_encoder_decoder:
        return transformers.AutoModelForImageTextToText, config
    raise InputError(
        f"--model {name!r}: its model_type is {config.model_type!r}, which transformers {transformers.__version__} "
        "does not know as a causal language model, nor as a multimodal one with such a model inside; expected a "
        "decoder that predicts the next token"
    )


def _require_sane(name: str, config: Any, *, trusted: bool) -> None:
    """Raise InputError for what would be built for minutes before it fails, or would fetch code and run it."""
    inner = [getattr(config, key, None) for key in (getattr(config, "sub_configs", None) or ())]
    for part in (config, *(part for part in inner if part is not None)):
        layers = getattr(part, "num_hidden_layers", None)
        if isinstance(layers, int) and layers > _MOST_LAYERS:
            raise InputError(
                f"--model {name!r}: its config asks for {layers} layers; expected at most {_MOST_LAYERS}, so is the "
                "config.json damaged?"
            )
        for what in ("attn", "experts"):
            # transformers takes any other name for a kernel on the hub, and loads the code that it finds there.
            asked = getattr(part, f"_{what}_implementation", None)
            if not trusted and asked is not None and asked not in _BUILT_IN:
                raise InputError(
                    f"--model {name!r}: its config asks for {what}_implementation {str(asked)[:80]!r}, which is no "
                    f"part of transformers; expected one of {', '.join(_BUILT_IN)}: take it out of config.json, or "
                    "allow code from elsewhere by --trust_remote_code"
                )


def torch_dtype(dtype: str) -> torch.dtype | None:
    """The dtype of that name; None for ``auto``, as stored."""
    name = dtype_name(dtype)
    return None if name == "auto" else getattr(torch, name)


def quantization(quant: str, place: torch.device, compute: torch.dtype) -> Any:
    """The config for bitsandbytes. Raises InputError where that is not installed or cannot run."""
    if place.type != "cuda":
        raise InputError(f"--quant {quant}: bitsandbytes needs a CUDA device, this run is on {place}; use --quant none")
    try:
        import bitsandbytes  # type: ignore[import-not-found]  # noqa: F401
    except ImportError:
        raise InputError(
            f"--quant {quant}: needs bitsandbytes, which is not installed; run: pip install 'relfv[quant]'"
        ) from None
    from transformers import BitsAndBytesConfig

    if quant == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


def _old_transformers() -> bool:
    import transformers

    return int(transformers.__version__.split(".")[0]) < 5
