"""A model that the user has opened, as stages use it, and handed back as it came."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from relfv.errors import InputError, RelfvError
from relfv.models.families import family_name
from relfv.settings import Settings

OBJECT = "object-sha256:"
"""Beginning of the identity of a model that was given as an object."""
_VALUES_A_TENSOR = 4096


@dataclass(frozen=True)
class GivenModel:
    """A transformers model and its tokenizer, in place of the name of a checkpoint.

    Raises InputError for an object that is no model."""

    model: Any
    """The model; of one that ``torch.compile`` gave the module within, since hooks would compile it over and over."""
    tokenizer: Any

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", getattr(self.model, "_orig_mod", self.model))
        require_model(self.model)

    @property
    def name(self) -> str:
        """Name of the model in artifacts: the name or path it was loaded from, else its class."""
        return getattr(self.model, "name_or_path", "") or type(self.model).__name__

    def identity(self) -> str:
        """Identity of the model in the fingerprint."""
        return weights_identity(self.model)

    def resolved(self, settings: Settings) -> Settings:
        """``settings`` with the model's own name, family, dtype and quantisation. Raises InputError for any that is
        asked for and is another."""
        from relfv.models.architecture import text_config

        packed = getattr(self.model.config, "quantization_config", None)
        packed = packed if isinstance(packed, dict) else vars(packed) if packed else {}
        own = {
            "dtype": _dtype_of(self.model),
            "quant": next(
                (n for n in ("8bit", "4bit") if packed.get(f"load_in_{n}", packed.get(f"_load_in_{n}"))), "none"
            ),
        }
        for field, unasked in (("dtype", "auto"), ("quant", "none")):
            asked = getattr(settings, field)
            if asked not in (unasked, own[field]):
                raise InputError(
                    f"{field}={asked!r}: the model given has {own[field]}; leave {field} out, or give a model opened so"
                )
        device = str(next(self.model.parameters()).device)
        if settings.device not in ("auto", device, device.partition(":")[0]):
            raise InputError(
                f"device={settings.device!r}: the model given is on {device}; leave device out, or move the model there"
            )
        family = family_name(settings.model_spec, text_config(self.model.config).model_type)
        return replace(settings, model=self.name, model_spec=family, **own)

    def checkpoint(self, spec: str) -> Any:
        """The model as ``opening.load_checkpoint`` gives it. Raises InputError for a model that relfv cannot use, and
        without a tokenizer."""
        from relfv.models.architecture import resolve
        from relfv.models.opening import Checkpoint
        from relfv.models.tokens import Tokens

        devices = {parameter.device for parameter in self.model.parameters()}
        if len(devices) != 1 or next(iter(devices)).type == "meta":
            found = ", ".join(sorted(map(str, devices)))
            raise InputError(
                f"{self.name}: its weights are on {found}; expected one device that holds them all: give its name "
                "instead, and relfv streams or spreads what one device cannot hold"
            )
        tokens = Tokens(self.tokenizer, n_embeddings=self.model.get_input_embeddings().weight.shape[0])
        return Checkpoint(self.model, tokens, resolve(self.model, spec), devices.pop(), _dtype_of(self.model))


def require_model(model: Any) -> None:
    """Raise InputError for an object that is no transformers model."""
    if isinstance(model, type) or not (hasattr(model, "config") and hasattr(model, "named_parameters")):
        found = "None" if model is None else f"a {'class' if isinstance(model, type) else type(model).__name__}"
        raise InputError(
            f"model is {found}; expected 'demo', a folder, a hub id, or a transformers model (of a pipeline its "
            ".model, of a wrapper its .module)"
        )


@contextmanager
def own_defaults() -> Iterator[None]:
    """While open, new tensors are float32 on the CPU and nothing is cast by itself, whatever the caller has set for its
    own code: PyTorch's default dtype and device, and autocast."""
    torch = sys.modules.get("torch")
    if torch is None:  # so nothing of it was set
        yield
        return
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        for kind in ("cpu", "cuda", "mps"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        yield


@contextmanager
def borrowed(model: Any) -> Iterator[None]:
    """While open, the model is in eval mode, not compiled, and attends in a way that knows its soft cap, and PyTorch
    has its ``own_defaults``; afterwards all is as it was: modes, attention and the buffers that a forward pass
    replaced."""
    with own_defaults(), _as_it_comes(model):
        yield


@contextmanager
def _as_it_comes(model: Any) -> Iterator[None]:
    from relfv.models.architecture import text_config

    compiled = [(module, call) for module in model.modules() if (call := module._compiled_call_impl) is not None]
    training = [module for module in model.modules() if module.training]
    buffers = [(module, dict(module._buffers)) for module in model.modules() if module._buffers]
    capped = getattr(text_config(model.config), "attn_logit_softcapping", None) is not None
    held = [model.config, text_config(model.config), *(m.config for m in model.modules() if hasattr(m, "config"))]
    attention = [(config, config._attn_implementation) for config in held] if capped else []
    model.eval()
    for module, _ in compiled:
        module._compiled_call_impl = None
    for config, _ in attention:  # see opening._load_weights
        config._attn_implementation = "eager"
    try:
        yield
    finally:
        for config, implementation in reversed(attention):
            config._attn_implementation = implementation
        for module in training:
            module.training = True
        for module, call in compiled:
            module._compiled_call_impl = call
        for module, own in buffers:
            module._buffers.update(own)


def weights_identity(model: Any) -> str:
    """A hash of the weights in memory: of every tensor its name, shape, dtype and up to 4,096 values spread evenly.

    Fine-tuned, merged or edited weights are another model, whatever path they were loaded from.
    """
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted({**dict(model.named_parameters()), **dict(model.named_buffers())}.items()):
        flat = tensor.detach().reshape(-1)
        at = torch.linspace(0, max(len(flat) - 1, 0), min(len(flat), _VALUES_A_TENSOR), dtype=torch.float64).long()
        values = flat[at.to(flat.device)].cpu().contiguous().view(torch.uint8).numpy()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + b"\0" + values.tobytes())
    return f"{OBJECT}{digest.hexdigest()}"


def difference(model: Any, identity: str) -> str | None:
    """How ``model`` is known to differ from the model that ``identity`` names, in words; None where it is the same, or
    where that cannot be told: a folder is not compared with a hub's commit."""
    from relfv.models.sources import model_identity

    source = getattr(model, "name_or_path", "")
    try:
        if identity.startswith(OBJECT):
            own = weights_identity(model)
        elif source and Path(source).exists():
            own = model_identity(source)
        else:
            own = f"hub:{source}@{getattr(model.config, '_commit_hash', None)}"
    except (RelfvError, OSError):
        return None
    kinds = [one.partition(":")[0] for one in (own, identity)]
    if own == identity or kinds[0] != kinds[1] or own.endswith("@None"):
        return None
    return f"{own[:60]}, and not {identity[:60]}"


def _dtype_of(model: Any) -> str:
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    return str(dtype).removeprefix("torch.")
