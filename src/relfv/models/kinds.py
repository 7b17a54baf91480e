"""Which of transformers' classes opens a checkpoint, from its config, and what its config may not ask for."""

from __future__ import annotations

from typing import Any

from relfv.errors import InputError
from relfv.models.gguf import read_config
from relfv.models.sources import unreadable

_MOST_LAYERS = 2000
"""Several times what the deepest language models have."""
_BUILT_IN = ("eager", "sdpa", "flex_attention", "grouped_mm", "batched_mm")
"""Ways to compute attention and experts whose code is in PyTorch and transformers themselves."""


def model_class(source: str, name: str, origin: dict[str, Any]) -> tuple[Any, Any]:
    """transformers' class for a causal language model, or for a multimodal one, of which relfv uses the text model; and
    the model's config.

    Raises InputError for any other kind of model, such as an encoder, with or without a decoder, and for a config that
    asks for more layers than any model has, or for code from elsewhere that the user has not agreed to.
    """
    import transformers
    from transformers.models.auto import modeling_auto as known

    try:
        config = read_config(source, **origin)
    except InputError:
        raise
    except Exception as problem:  # of many kinds: missing, damaged, or in need of code from the checkpoint
        raise unreadable(name, "config", problem) from problem
    _require_sane(name, config, trusted=origin["trust_remote_code"])
    brings_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if not brings_code and _looks_both_ways(config, known):
        raise InputError(
            f"--model {name!r}: is an encoder ({config.model_type}), whose tokens see later ones; expected a decoder "
            "that predicts the next token (one of BERT's kin trained as such has is_decoder true in its config)"
        )
    if config.model_type in known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or brings_code:
        return transformers.AutoModelForCausalLM, config
    if config.model_type in known.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and not config.is_encoder_decoder:
        return transformers.AutoModelForImageTextToText, config
    raise InputError(
        f"--model {name!r}: its model_type is {config.model_type!r}, which transformers {transformers.__version__} "
        "does not know as a causal language model, nor as a multimodal one with such a model inside; expected a "
        "decoder that predicts the next token"
    )


def _looks_both_ways(config: Any, known: Any) -> bool:
    """True for an encoder of a family, such as BERT's, whose class for causal language models opens it all the same."""
    in_both = {*known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} & {*known.MODEL_FOR_MASKED_LM_MAPPING_NAMES}
    as_decoder = any(getattr(config, name, False) for name in ("is_decoder", "is_encoder_decoder", "causal"))
    return config.model_type in in_both and not as_decoder


def class_within(kind: Any, config: Any) -> Any:
    """The model's own class, which ``kind`` would choose for a config of just its kind; None for any other config."""
    from transformers.models.auto import modeling_auto as known

    of_text = kind is known.AutoModelForCausalLM
    mapping = known.MODEL_FOR_CAUSAL_LM_MAPPING if of_text else known.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    found = mapping.get(type(config), None)
    return found if getattr(found, "config_class", None) is type(config) else None


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
