"""Length of the prompts that a model takes, read from its config.

Learned positions end: a longer prompt is an index error, on a GPU one that ends the process. Rotary ones go on without
a word, far outside what the model was trained on. ALiBi has no end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from relfv.errors import InputError

_LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions")
"""Names in configs for the number of positions."""


class TooLong(InputError):
    """Prompts that do not fit the model: their q_id is skipped, as one with too few rows is."""


@dataclass(frozen=True)
class Context:
    """Lengths in tokens, of a prompt together with its answer."""

    limit: int | None
    """Most tokens that the model takes; None where nothing ends."""
    marks: tuple[tuple[int, str], ...] = ()
    """(length, what is different beyond it), where longer prompts run all the same."""

    def require_room(self, length: int) -> None:
        """Raise TooLong for a prompt of ``length`` tokens, with its answer, that does not fit."""
        if self.limit is not None and length > self.limit:
            raise TooLong(
                f"prompt and answer have up to {length} tokens, and the model has positions for {self.limit}; "
                "expected prompts that fit: use fewer demos (--n_demos), shorter words or a model with more"
            )

    def notes(self, length: int) -> list[str]:
        """Notes for readers of the results on prompts of ``length`` tokens."""
        return [f"the longest prompt has {length} tokens, {said}" for mark, said in self.marks if length > mark]


def context_of(config: Any) -> Context:
    """The context of the language model that ``config``, or its text part, describes."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    stated = next((limit for name in _LIMITS if (limit := _length(config, name))), None)
    if _has_alibi(config):
        # MPT makes its table of biases for max_seq_len positions; the other families make theirs as they go.
        return Context(stated if config.model_type == "mpt" else None, tuple(_windows(config)))
    ropes = [
        (_length(rope, "original_max_position_embeddings") or _length(config, "original_max_position_embeddings"), rope)
        for rope in _ropes(config)
    ]
    # Some configs state the length before scaling, others after it: the scaled one is what the model takes.
    scaled = [int((original or stated or 0) * factor) for original, rope in ropes if (factor := _factor(rope))]
    limit = max((stated, *scaled)) if stated else None
    originals = {original or stated for original, rope in ropes if _factor(rope) or original} - {None, limit}
    beyond = [
        (length, f"more than the {length} that the model was made with before its rotary positions were scaled")
        for length in sorted(originals)  # type: ignore[type-var]
    ]
    return Context(limit, (*beyond, *_windows(config)))  # type: ignore[arg-type]


def _length(config: Any, name: str) -> int | None:
    """A number of tokens, or None for what is none, such as the -1 of families without positions."""
    value = config.get(name) if isinstance(config, dict) else getattr(config, name, None)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _has_alibi(config: Any) -> bool:
    attention = getattr(config, "attn_config", None)
    return bool(
        config.model_type == "bloom" or getattr(config, "alibi", False) is True or getattr(attention, "alibi", False)
    )


def _ropes(config: Any) -> list[dict[str, Any]]:
    """The rotary parameters, of all kinds of layers where they differ by kind."""
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(found, dict):
        return []
    by_kind = [value for value in found.values() if isinstance(value, dict)]
    return by_kind or [found]


def _factor(rope: dict[str, Any]) -> float | None:
    """Factor by which positions are stretched; None where they are not."""
    factor = rope.get("factor")
    return float(factor) if isinstance(factor, int | float) and factor > 1 else None


def _windows(config: Any) -> Iterator[tuple[int, str]]:
    kinds = getattr(config, "layer_types", None)
    local = {
        "sliding_attention": _length(config, "sliding_window"),
        "chunked_attention": _length(config, "attention_chunk_size"),
    }
    if kinds is None and getattr(config, "use_sliding_window", True):
        kinds = ["sliding_attention"]
    if config.model_type == "gpt_neo":
        kinds, local = list(getattr(config, "attention_layers", [])), {"local": _length(config, "window_size")}
    for kind, length in local.items():
        if length and kind in (kinds or ()):
            said = f"more than the {length} that its sliding-window layers see: there the first demos are out of sight"
            yield length, said
