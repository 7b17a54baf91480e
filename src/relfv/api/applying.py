"""Add a vector to a transformers model's residual stream with hooks, at the right token of any batch.

The place is the engine's: the hidden state after a block. The token is the last of each prompt, which the attention
mask tells, whichever side a batch is padded on. ``generate()`` runs the prompt once and then one token a pass; what the
cache holds before a pass tells a prompt from what is written after it. Where that cannot be told nothing is guessed: an
error says so.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from relfv.engine.hooks import editing_outputs
from relfv.errors import InputError, RunError, UsageWarning
from relfv.models.architecture import text_config
from relfv.models.layout import find_layout

Where = Literal["last", "generated"]


@dataclass(frozen=True)
class Frame:
    """The token ids that prompts begin and end with, as they were when the vector was made; empty where not known."""

    begin: Sequence[int]
    end: Sequence[int]

    def problem(self, ids: list[int]) -> str | None:
        """Say in what a prompt differs from the frame; None if it fits."""
        begin, end = list(self.begin), list(self.end)
        n_begin, n_end = len(begin), len(end)
        if end and ids[-n_end:] != end:
            more = ids[-n_end - 1 : -1] == end
            said = f"ends in the token ids {ids[-n_end - more :]}, the vector's own in {end}"
            return f"{said}: there is something after that, such as a space" if more else said
        if ids[:n_begin] != begin:
            twice = ids[1 : n_begin + 1] == begin
            said = f"begins with the token ids {ids[: n_begin + twice]}, the vector's own with {begin}"
            return f"{said}: is BOS there twice?" if twice else said
        return None


@contextmanager
def adding(model: Any, layer: int, vector: torch.Tensor, where: Where, frame: Frame) -> Iterator[None]:
    """While open, add ``vector`` (resid_dim,), already times alpha, after block ``layer`` of ``model``: at the last
    token of every prompt, and with ``where`` "generated" at every token after it, too.

    Raises InputError for a layer, a width or a way of running that does not fit; on leaving RunError if nothing was
    added. The hooks are gone afterwards, whatever happened.
    """
    if where not in ("last", "generated"):
        raise InputError(f"where={where!r}: expected 'last' or 'generated'")
    name, config = type(model).__name__, text_config(model.config)
    blocks = find_layout(model, config, "auto").blocks
    if not 0 <= layer < len(blocks):
        raise InputError(f"layer {layer}: {name} has layers 0 to {len(blocks) - 1}")
    if vector.shape != (config.hidden_size,):
        raise InputError(
            f"the vector has {len(vector)} dimensions and the residual stream of {name} {config.hidden_size}; "
            "expected the model that the vector was made with"
        )
    state = _Adding(vector, where, frame)
    with ExitStack() as stack:
        for module in _around(model, blocks[layer]):
            stack.enter_context(state.following(module))
        stack.enter_context(editing_outputs([(blocks[layer], state.edit)]))
        yield
        if not state.has_added:
            raise RunError(
                f"nothing was added: no prompt went through block {layer} of the {name} that the vector was applied "
                "to; run that very model inside the with block"
            )


def _around(model: nn.Module, block: nn.Module) -> list[nn.Module]:
    """The model and those of its modules that contain the block: any of them may be what is called."""
    from transformers import PreTrainedModel

    inside = (module for module in model.modules() if isinstance(module, PreTrainedModel))
    return list(dict.fromkeys([model, *(module for module in inside if any(m is block for m in module.modules()))]))


@dataclass(frozen=True)
class _Call:
    """The inputs that the model was given for one forward pass."""

    ids: torch.Tensor | None
    mask: Any
    n_past: int
    """Tokens in the cache."""
    asks_for_one: bool | None
    """Whether only the last position's logits are asked for, as ``generate()`` does; None for a model that cannot be
    asked so."""

    @staticmethod
    def of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
        signature = inspect.signature(module.forward)
        given = signature.bind_partial(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        past = given.get("past_key_values")
        n_past = 0 if past is None else int(past.get_seq_length()) if hasattr(past, "get_seq_length") else len(past)
        keep, can_be_asked = given.get("logits_to_keep"), "logits_to_keep" in {*given, *signature.parameters}
        of_one = isinstance(keep, int) and keep == 1 if can_be_asked else None
        return _Call(given.get("input_ids"), given.get("attention_mask"), n_past, of_one)

    def real(self, hidden: torch.Tensor) -> torch.Tensor:
        """bool (N, P): True for tokens that are not padding."""
        n, width = hidden.shape[:2]
        if self.mask is None:
            real = torch.ones(n, width, dtype=torch.bool)
        elif isinstance(self.mask, torch.Tensor) and self.mask.dim() == 2:
            real = self.mask[:, -width:].bool()
        elif isinstance(self.mask, torch.Tensor) and self.mask.dim() == 4:  # whether a token may attend to itself
            own = self.mask[:, 0].diagonal(self.n_past, -2, -1)[:, :width]
            real = own if own.dtype == torch.bool else own == 0
        else:
            raise InputError(f"attention_mask is a {type(self.mask).__name__}; expected a tensor (batch, token)")
        return real.expand(n, width).to(hidden.device)


class _Adding:
    """State of a vector that is being applied: the pass under way, and the prompts it belongs to."""

    def __init__(self, vector: torch.Tensor, where: Where, frame: Frame) -> None:
        self.has_added = False
        self._vector, self._where, self._frame = vector, where, frame
        self._call: _Call | None = None
        self._depth = 0
        self._prompt: torch.Tensor | None = None
        """Token ids of the prompts at hand, and the number of tokens of the last pass over them."""
        self._width = 0
        self._ends = torch.empty(0)
        self._warned = False

    @contextmanager
    def following(self, module: nn.Module) -> Iterator[None]:
        """While open, remember the inputs that ``module`` is called with, unless an outer module that was called holds
        them."""

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._depth += 1
            if self._depth == 1:
                self._call = _Call.of(module, args, kwargs)

        def after(*_: Any) -> None:
            self._depth -= 1

        handles = [module.register_forward_pre_hook(before, with_kwargs=True)]
        handles.append(module.register_forward_hook(after, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def edit(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """The block's output (N, P, resid_dim) with the vector added at the right tokens; None for no change."""
        call = self._call
        if call is None:
            raise InputError("a block of the model ran by itself; call the model that the vector was applied to")
        real = call.real(hidden)
        if call.n_past:
            if hidden.shape[1] > 1:
                raise InputError(
                    f"a pass of {hidden.shape[1]} tokens over a cache of {call.n_past}: which of them is the last of a "
                    "prompt cannot be told; give each prompt whole and without a cache, and no assistant model"
                )
            on = real if self._where == "generated" else None
        else:
            self._take_prompt(call, real)
            at = torch.arange(hidden.shape[1], device=hidden.device)[None]
            on = (at == self._ends) if self._where == "last" else (at >= self._ends) & real
        if on is None:
            return None
        self.has_added = True
        return hidden + on[..., None] * self._vector.to(hidden)

    def _take_prompt(self, call: _Call, real: torch.Tensor) -> None:
        """Note where each row's prompt ends. Without a cache ``generate()`` feeds everything written so far again: the
        same prompt, one token longer each time. Calls that ask for the logits of all positions are prompts of their
        own."""
        n_before, width, ids = self._width, real.shape[1], call.ids
        self._width = width
        known = self._prompt
        if known is not None and ids is not None and call.asks_for_one is not False:
            goes_on = width == n_before + 1 and ids[:, : known.shape[1]].equal(known)
            if goes_on:
                return
        self._prompt = ids
        at = torch.arange(width, device=real.device)
        self._ends = torch.where(real, at, -1).amax(1, keepdim=True)
        if call.asks_for_one and bool((self._ends < width - 1).any()):
            raise InputError(
                "the batch is padded on the right, and generate() would go on after the padding; pad on the left: "
                "tokenizer.padding_side = 'left', or take the batch from fv.prompt([...], tokenizer)"
            )
        if ids is not None and not self._warned:
            self._warn_of(ids, real)

    def _warn_of(self, ids: torch.Tensor, real: torch.Tensor) -> None:
        for row, its in zip(ids.tolist(), real.tolist(), strict=True):
            if problem := self._frame.problem([token for token, is_real in zip(row, its, strict=True) if is_real]):
                self._warned = True
                message = f"a prompt {problem}. fv.prompt(word, tokenizer) gives a prompt exactly as the vector's own"
                warnings.warn(message, UsageWarning, stacklevel=2)
                return
