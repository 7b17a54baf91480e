"""Open a causal language model: load its tokenizer and weights, and find its parts.

The demo model, a local folder, a GGUF file, a model in the Hugging Face cache and one on the hub (sources.py) all go
through ``from_pretrained`` of transformers' auto classes; an adapter (adapters.py) is merged into its base model, and
weights that come packed in few bits are unpacked where transformers can (packed.py). Code from a checkpoint is never
run unless the user says ``--trust_remote_code``.
"""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from relfv.errors import InputError
from relfv.models.adapters import adapter_in, merged, require_peft
from relfv.models.architecture import Architecture, resolve, text_config
from relfv.models.cards import Cards, counts_foreseen, spread
from relfv.models.devices import choose_devices, taken
from relfv.models.formats import as_object, format_of, packing_note, quantization, require_format, unpacking
from relfv.models.gguf import DTYPE, read_tokenizer
from relfv.models.kinds import class_within, model_class
from relfv.models.memory import fits_widened
from relfv.models.placement import foreseen
from relfv.models.reading import reading
from relfv.models.size import check_size
from relfv.models.sources import dtype_name, location, model_source, snapshot, unreadable, weights_source
from relfv.models.stored import damaged_file
from relfv.models.streaming import Streaming, stream
from relfv.models.tokens import Tokens, require_tokenizer

log = logging.getLogger(__name__)


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
    """Placement of the blocks on several cards, of which ``device`` is then the first; None on one device."""


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
    meanwhile: Callable[[torch.device], None] | None = None,
) -> Checkpoint:
    """Load tokenizer and weights, and find the model's parts under ``spec``.

    ``exact``: on a CPU that has the memory, weights of 16 bits are held in float32: the same numbers, which need not be
    widened again for every pass. ``meanwhile`` is called with a card while weights are read onto it. Raises InputError
    if the model cannot be found or read, the spec does not fit it, or the device cannot do what is asked.
    """
    places = taken(choose_devices(device))
    place = places[0]
    adapter = adapter_in(model_source(name))
    if adapter:
        require_peft(adapter)
        if quant != "none":
            raise InputError(f"--model {name!r}: an adapter cannot be merged into packed weights; use --quant none")
    source, asked = weights_source(name, revision)
    place_of, origin = location(source, asked)
    origin = {**origin, "trust_remote_code": trust_remote_code}
    dtype = DTYPE if dtype == "auto" and "gguf_file" in origin else dtype
    with quiet_transformers(), ExitStack() as stack:
        # the config first, or its errors would be blamed on the tokenizer, which reads it, too
        kind, config = model_class(place_of, name, origin)
        check_size(name, source, text_config(config), place, torch_dtype(dtype))
        read = None
        if len(places) == 1 and offload in ("auto", "none") and _may_read(config, place, quant, origin):
            read = stack.enter_context(reading(snapshot(source, asked), config, place, torch_dtype(dtype)))
        placement = foreseen(
            name, spec, snapshot(source, asked), kind, config, offload=offload, device=place, dtype=torch_dtype(dtype),
            quant=quant, trust_remote_code=trust_remote_code,
        ) if len(places) == 1 else None  # fmt: skip
        counts = counts_foreseen(
            name, spec, kind, config, places, offload=offload, dtype=torch_dtype(dtype), quant=quant,
            trust_remote_code=trust_remote_code,
        ) if len(places) > 1 else []  # fmt: skip
        require_format(name, config, place, quant)
        loaded_on = torch.device("cpu") if counts or (placement and placement.streams) else place
        if adapter and adapter.has_tokenizer:
            tokenizer = _load_tokenizer(str(adapter.folder), name, {"trust_remote_code": trust_remote_code})
        else:
            tokenizer = _load_tokenizer(place_of, name, origin)
        if read and meanwhile:
            meanwhile(place)
        model = _load_weights(kind, place_of, name, config, loaded_on, dtype, quant, origin, read)
    if adapter:
        model = merged(model, adapter, loaded_on).eval().requires_grad_(False)
    arch = resolve(model, spec)
    more = [*([adapter.note] if adapter else []), *packing_note(model, format_of(config) or format_of(model.config))]
    arch = replace(arch, notes=(*arch.notes, *more))
    for note in arch.notes:
        log.warning("%s", note)
    stored = next(p.dtype for p in model.parameters() if p.is_floating_point())
    streaming = stream(model, arch, placement, place) if placement and placement.streams else None
    cards = spread(model, arch, counts, places) if counts else None
    if streaming or cards:
        log.info("weights: %s", placement or cards)
    elif (
        exact
        and place.type == "cpu"
        and stored.itemsize == 2
        and not getattr(model, "hf_quantizer", None)
        and fits_widened(model)
    ):
        model.float()
    tokens = Tokens(tokenizer, n_embeddings=model.get_input_embeddings().weight.shape[0])
    return Checkpoint(model, tokens, arch, place, str(stored).removeprefix("torch."), streaming, cards)


def load_tokenizer(name: str, revision: str, *, trust_remote_code: bool) -> Tokens:
    """The tokenizer alone, of a model that ``load_checkpoint`` would open. Raises InputError as that does."""
    adapter = adapter_in(model_source(name))
    of_adapter = str(adapter.folder) if adapter and adapter.has_tokenizer else None
    source, origin = location(*((of_adapter, None) if of_adapter else weights_source(name, revision)))
    with quiet_transformers():
        return Tokens(_load_tokenizer(source, name, {**origin, "trust_remote_code": trust_remote_code}))


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """While open, transformers shows no warnings and no progress bars.

    It would print a table of missing and unexpected tensors; ``_require_whole`` says what matters of it in one line.
    """
    from transformers.utils import logging as hf_logging

    before, showed_bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(before)
        if showed_bars:
            hf_logging.enable_progress_bar()


def _load_tokenizer(source: str, name: str, origin: dict[str, Any]) -> Any:
    try:
        tokenizer = read_tokenizer(source, **origin)
    except InputError:
        raise
    except Exception as problem:  # of many kinds in transformers, and all mean that the user's model is unreadable
        raise unreadable(name, "tokenizer", problem) from problem
    try:
        require_tokenizer(tokenizer)
    except InputError as problem:
        raise InputError(f"--model {name!r}: {problem}") from None
    return tokenizer


def _load_weights(
    kind: Any,
    source: str,
    name: str,
    config: Any,
    place: torch.device,
    dtype: str,
    quant: str,
    origin: dict[str, Any],
    read: Callable[[], dict[str, torch.Tensor]] | None,
) -> Any:
    options: dict[str, Any] = {"torch_dtype" if _old_transformers() else "dtype": torch_dtype(dtype) or "auto"}
    options["device_map"] = {"": str(place)}
    if quant != "none":
        options["quantization_config"] = quantization(quant, place)
    unpacked = unpacking(config)
    if unpacked:
        # In the config: as an option it would bring a warning.
        options["config"] = copy.copy(config)
        options["config"].quantization_config = unpacked
    if "gguf_file" in origin:  # its config is not read once more, and says nothing of quantisation itself
        options["config"] = copy.copy(config)
        del options["config"].quantization_config
        if unpacked:
            options["quantization_config"] = as_object(unpacked)
    # For tensors that are missing or of another shape transformers draws random ones, with a warning at most.
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    first = _read_first(kind, config, options, read) if read and place.type == "cuda" else None
    try:
        model, loading_info = first or _loaded(kind, source, {**origin, **options})
    except torch.OutOfMemoryError:
        raise InputError(
            f"--model {name!r} does not fit on {place}; use --dtype bf16, --quant 8bit or 4bit, or a larger device"
        ) from None
    except Exception as problem:  # of many kinds: missing, damaged or unknown weights
        if damaged := damaged_file(snapshot(source, origin.get("revision"))):
            raise InputError(
                f"--model {name!r}: cannot open its model: {damaged}; expected weights that are whole, so fetch or "
                "copy that file again"
            ) from problem
        raise unreadable(name, "model", problem) from problem
    _require_whole(name, loading_info)
    if getattr(text_config(model.config), "attn_logit_softcapping", None) is not None:
        # SDPA has no soft cap (Gemma 2); some releases of transformers use SDPA all the same and drop the cap.
        model.set_attn_implementation("eager")
    return model.eval().requires_grad_(False)


def _may_read(config: Any, place: torch.device, quant: str, origin: dict[str, Any]) -> bool:
    """Whether the weights are ordinary ones that go onto a card."""
    is_plain = not unpacking(config) and not format_of(config) and quant == "none" and "gguf_file" not in origin
    return is_plain and place.type == "cuda" and not origin["trust_remote_code"]


def _read_first(kind: Any, config: Any, options: dict[str, Any], read: Callable[[], dict[str, torch.Tensor]]) -> Any:
    """Load the model as ``_loaded`` does, but faster: from weights that are in their place already (reading.py). None
    where that cannot be; ``_loaded`` then says why, if it cannot, either."""
    try:
        own, weights = class_within(kind, config), read()
        if own is None or not weights:
            return None
        loaded = own.from_pretrained(None, config=config, state_dict=weights, **options)
        del weights
        torch.cuda.empty_cache()  # transformers has made room for them, where they are not
        return loaded
    except Exception as problem:
        log.debug("weights in transformers' own way: %s", problem, exc_info=True)
    gc.collect()  # errors of transformers keep what was read in reference cycles
    torch.cuda.empty_cache()
    return None


def _loaded(kind: Any, source: str, options: dict[str, Any]) -> Any:
    """Load the model as ``from_pretrained`` does; packed weights that transformers fails to unpack are left to their
    format's code."""
    packed = getattr(options.get("config"), "quantization_config", {})
    try:
        return kind.from_pretrained(source, **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as problem:
        if not packed:
            raise
        log.info("its packed weights could not be unpacked (%s); using them as they are stored", problem)
    packed["dequantize"] = False
    model, loading_info = kind.from_pretrained(source, **options)
    with torch.inference_mode():  # some formats change their modules the first time they are used
        model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device))
    return model, loading_info


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


def torch_dtype(dtype: str) -> torch.dtype | None:
    """The dtype of that name; None for ``auto``, as stored."""
    name = dtype_name(dtype)
    return None if name == "auto" else getattr(torch, name)


def _old_transformers() -> bool:
    import transformers

    return int(transformers.__version__.split(".")[0]) < 5
