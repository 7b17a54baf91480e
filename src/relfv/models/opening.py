"""Open a causal language model: the demo model, a local folder, the Hugging Face cache, or the hub if there is one.

All four go through ``from_pretrained`` of transformers' auto classes; ``demo`` is the name of a folder inside this
package. A folder may also hold an adapter (adapters.py), which is merged into its base model.
Code from a checkpoint is never run unless the user says ``--trust_remote_code``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from relfv.errors import InputError
from relfv.models.adapters import Adapter, adapter_in, merged, require_peft
from relfv.models.families import Architecture, resolve, text_config
from relfv.models.identity import folder_identity
from relfv.models.tokens import Tokens

log = logging.getLogger(__name__)

DEMO = "demo"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPE_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
QUANTS = ("none", "8bit", "4bit")


@dataclass(frozen=True)
class Checkpoint:
    """A model as it came from disk, with its parts found."""

    model: Any
    """The transformers model, in eval mode, without gradients."""
    tokens: Tokens
    arch: Architecture
    device: torch.device
    dtype: str
    """dtype of the stored weights, e.g. ``bfloat16``."""


def load_checkpoint(
    name: str,
    spec: str,
    *,
    device: str,
    dtype: str,
    quant: str,
    quant_compute: torch.dtype,
    trust_remote_code: bool,
) -> Checkpoint:
    """Load tokenizer and weights and find the parts that ``spec`` names.

    ``quant_compute`` is the dtype in which 4-bit layers compute. Raises InputError if the model cannot be found or
    read, the spec does not fit it, or the device cannot do what is asked.
    """
    place = choose_device(device)
    source = model_source(name)
    adapter = adapter_in(source)
    if adapter:
        require_peft(adapter)
        if quant != "none":
            raise InputError(f"--model {name!r}: an adapter cannot be merged into packed weights; use --quant none")
        source = _base_source(adapter)
    origin: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if not Path(source).is_dir():
        origin["revision"] = hub_commit(source, adapter.revision if adapter else None)
    with _quiet_transformers():
        if adapter and adapter.has_tokenizer:
            tokenizer = _load_tokenizer(str(adapter.folder), name, {"trust_remote_code": trust_remote_code})
        else:
            tokenizer = _load_tokenizer(source, name, origin)
        model = _load_weights(source, name, place, dtype, quant, quant_compute, origin)
    if adapter:
        model = merged(model, adapter, place).eval().requires_grad_(False)
    arch = resolve(model, spec)
    if adapter:
        arch = replace(arch, notes=(*arch.notes, adapter.note))
    for note in arch.notes:
        log.warning("%s", note)
    stored = next(p.dtype for p in model.parameters() if p.is_floating_point())
    tokens = Tokens(tokenizer, n_embeddings=model.get_input_embeddings().weight.shape[0])
    return Checkpoint(model, tokens, arch, place, str(stored).removeprefix("torch."))


def choose_device(device: str) -> torch.device:
    """``auto`` is CUDA if there is one, else the CPU. Raises InputError for a device that is not there."""
    if device == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise InputError(f"--device {device!r}: not a device; expected auto, cpu, cuda, cuda:<n> or mps") from None
    if chosen.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (chosen.index or 0) >= count:
            raise InputError(
                f"--device {device!r}: this machine has {count} usable CUDA device(s); use --device cpu, or a PyTorch "
                "build and driver that see your GPU (python -c 'import torch; print(torch.cuda.is_available())')"
            )
        return torch.device("cuda", chosen.index or 0)
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise InputError(f"--device {device!r}: no Metal device on this machine; use --device cpu")
    if chosen.type not in ("cpu", "mps") or chosen.index:
        raise InputError(f"--device {device!r}: expected auto, cpu, cuda, cuda:<n> or mps")
    return chosen


def model_source(name: str) -> str:
    """Where ``from_pretrained`` finds the model: a folder, or a hub id. Raises InputError for a path that is missing."""
    if name == DEMO:
        return str(Path(__file__).parents[1] / "demo" / "weights")
    path = Path(name).expanduser()
    try:
        path.stat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as problem:  # too long, not allowed to look, a NUL in it
        why = problem.strerror if isinstance(problem, OSError) else problem
        raise InputError(
            f"--model {name[:200]!r}: cannot be opened ({why}); expected a model folder, a hub id or 'demo'"
        ) from None
    if not name:
        raise InputError("--model '': is empty; expected a model folder, a hub id or 'demo'")
    if path.is_dir():
        if not any((path / known).is_file() for known in ("config.json", "adapter_config.json")):
            raise InputError(f"--model {name!r}: the folder has no config.json; expected a Hugging Face model folder")
        return str(path)
    if path.exists():
        raise InputError(f"--model {name!r}: is a file; expected a Hugging Face model folder or a hub id")
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    in_a_folder_here = path.parent != Path() and path.parent.is_dir()
    if looks_like_path or not _is_hub_id(name) or (in_a_folder_here and _cached_commit(name) is None):
        raise InputError(f"--model {name!r}: no such folder; expected a model folder, a hub id or 'demo'")
    return name


def model_identity(name: str) -> str:
    """What the fingerprint knows the model by: a content hash of a folder, or hub id and commit. Reads no weights.

    Raises InputError if the model is neither a folder nor in the cache nor, where there is a network, on the hub.
    """
    source = model_source(name)
    adapter = adapter_in(source)
    if adapter:
        return f"folder-sha256:{folder_identity(adapter.folder)}+{_identity(_base_source(adapter), adapter.revision)}"
    return _identity(source)


def _identity(source: str, revision: str | None = None) -> str:
    if Path(source).is_dir():
        return f"folder-sha256:{folder_identity(Path(source))}"
    return f"hub:{source}@{hub_commit(source, revision)}"


def _base_source(adapter: Adapter) -> str:
    """Where the base model of an adapter is. Raises InputError if it is not there."""
    try:
        source = model_source(adapter.base)
        if not Path(source).is_dir():
            hub_commit(source, adapter.revision)
    except InputError as problem:
        raise InputError(
            f"--model {str(adapter.folder)!r}: is an adapter for {adapter.base!r}, which cannot be opened "
            f"({problem}); write the base model's folder into base_model_name_or_path of its adapter_config.json"
        ) from None
    return source


def hub_commit(repo_id: str, revision: str | None = None) -> str:
    """The commit that is used of a hub model: the one in the local cache, else the newest, which is then cached.

    Tokenizer and weights are loaded at this commit, so that a later push to the hub does not change a run half-way.
    """
    from huggingface_hub import hf_hub_download

    cached = _cached_commit(repo_id, revision)
    if cached is None:
        try:
            hf_hub_download(repo_id, "config.json", revision=revision)
        except Exception as problem:  # no network, no such repo, no access: many kinds, all mean it cannot be had
            raise _unreadable(repo_id, "config", problem) from problem
        cached = _cached_commit(repo_id, revision)
    if cached is None:
        raise InputError(f"--model {repo_id!r}: its config was fetched but is not in the Hugging Face cache")
    return cached


def _is_hub_id(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _cached_commit(repo_id: str, revision: str | None = None) -> str | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo_id, "config.json", revision=revision)
    return Path(found).parent.name if isinstance(found, str) else None


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without transformers' own warnings and bars: its tables of tensors are many lines, written to the terminal as they
    are found in the files. relfv says in one line what of them matters."""
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
    except Exception as problem:  # transformers raises many kinds for an unreadable folder; all mean bad input
        raise _unreadable(name, "tokenizer", problem) from problem


def _load_weights(
    source: str,
    name: str,
    place: torch.device,
    dtype: str,
    quant: str,
    quant_compute: torch.dtype,
    origin: dict[str, Any],
) -> Any:
    options: dict[str, Any] = {"torch_dtype" if _old_transformers() else "dtype": _torch_dtype(dtype)}
    options["device_map"] = {"": str(place)}
    if quant != "none":
        options["quantization_config"] = _quantization(quant, place, quant_compute)
    # Of tensors that are missing or of another shape transformers would make up random ones, with a warning at most.
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    auto_class = _auto_class(source, name, origin)
    try:
        model, found = auto_class.from_pretrained(source, **origin, **options)
    except torch.OutOfMemoryError:
        raise InputError(
            f"--model {name!r} does not fit on {place}; use --dtype bf16, --quant 8bit or 4bit, or a larger device"
        ) from None
    except Exception as problem:  # likewise: missing, damaged or unknown checkpoints come as many kinds
        raise _unreadable(name, "model", problem) from problem
    _require_whole(name, found)
    if getattr(text_config(model.config), "attn_logit_softcapping", None) is not None:
        # SDPA has no soft cap (Gemma 2); some releases of transformers use it all the same and leave the cap out.
        model.set_attn_implementation("eager")
    return model.eval().requires_grad_(False)


def _require_whole(name: str, found: Any) -> None:
    """Raise InputError for a checkpoint that lacks tensors of its model, or has them in another shape."""
    missing = sorted(map(str, found["missing_keys"]))
    mismatched = sorted(str(key if isinstance(key, str) else key[0]) for key in found["mismatched_keys"])
    for keys, what in ((missing, "missing from"), (mismatched, "of another shape than the config says in")):
        if keys:
            raise InputError(
                f"--model {name!r}: {len(keys)} of the model's tensors, such as {keys[0]!r}, are {what} its weights; "
                "expected weights that are whole and made for this config, so fetch or copy the model again"
            )
    if unexpected := sorted(map(str, found["unexpected_keys"])):
        log.warning(
            "%s: %d tensors of its weights, such as %r, have no place in the model and were left out",
            name,
            len(unexpected),
            unexpected[0],
        )


def _auto_class(source: str, name: str, origin: dict[str, Any]) -> Any:
    """The class that opens it: causal language models, and multimodal ones for the sake of the text model inside.

    Raises InputError for any other kind, such as encoders, and encoders with a decoder.
    """
    import transformers
    from transformers.models.auto import modeling_auto as known

    try:
        config = transformers.AutoConfig.from_pretrained(source, **origin)
    except Exception as problem:  # likewise
        raise _unreadable(name, "config", problem) from problem
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if config.model_type in known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or own_code:
        return transformers.AutoModelForCausalLM
    if config.model_type in known.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and not config.is_encoder_decoder:
        return transformers.AutoModelForImageTextToText
    raise InputError(
        f"--model {name!r}: its model_type is {config.model_type!r}, which transformers {transformers.__version__} "
        "does not know as a causal language model, nor as a multimodal one with such a model inside; expected a "
        "decoder that predicts the next token"
    )


def dtype_name(dtype: str) -> str:
    """``auto`` or torch's name of a dtype, from the name or its short form. Raises InputError."""
    name = DTYPE_ALIASES.get(dtype, dtype)
    if name != "auto" and name not in DTYPES:
        raise InputError(f"--dtype {dtype!r}: expected one of auto, {', '.join([*DTYPES, *DTYPE_ALIASES])}")
    return name


def _torch_dtype(dtype: str) -> Any:
    name = dtype_name(dtype)
    return name if name == "auto" else DTYPES[name]


def _quantization(quant: str, place: torch.device, compute: torch.dtype) -> Any:
    """Config for bitsandbytes. Raises InputError with the install command where it is absent or cannot run."""
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


def _unreadable(name: str, what: str, problem: Exception) -> InputError:
    first_line = str(problem).strip().split("\n")[0] or type(problem).__name__
    if "Weights only load failed" in first_line:  # PyTorch goes on to recommend what must not be done
        return InputError(
            f"--model {name!r}: its weights are a damaged pickle, or one that holds more than tensors, and no code in "
            "weights is ever run; expected safetensors, or a .bin file of tensors"
        )
    offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") and not Path(name).is_dir() else ""
    return InputError(
        f"--model {name!r}: cannot open its {what}{offline}: {first_line}; "
        "expected a Hugging Face model folder, a model in the local cache or on the hub, or 'demo'"
    )
