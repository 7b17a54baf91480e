"""Hooks that always detach, and raise if they never fired."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from relfv.engine.arithmetic import replaced
from relfv.errors import RunError

_turn: object | None = None


@contextmanager
def turn_of(one: object) -> Iterator[None]:
    """While open, edits that were opened in another's turn do nothing: passes that run in step (in_step.py) have edits
    of their own, on the same modules. Edits that were opened in nobody's turn work in every turn."""
    global _turn
    before, _turn = _turn, one
    try:
        yield
    finally:
        _turn = before


def called_instead(
    functions: Sequence[tuple[nn.Module, Callable[..., Any] | None]],
) -> AbstractContextManager[None]:
    """While open, a call of one of these modules calls its function, and none of the module's hooks run; with None, the
    module itself is called. The attribute is what ``nn.Module.compile`` sets."""
    return replaced(functions, "_compiled_call_impl")


@contextmanager
def editing_inputs(
    edits: Sequence[tuple[nn.Module, Callable[[torch.Tensor], torch.Tensor | None]]],
) -> Iterator[None]:
    """While open, each module's first argument goes through its function; None leaves it as it is.

    Raises RunError on leaving if one of the functions never ran: an edit that silently does nothing is a wrong result.
    """
    with ExitStack() as stack:
        fired = [stack.enter_context(_pre_hook(module, edit)) for module, edit in edits]
        yield
        _require_fired(fired, edits)


@contextmanager
def editing_outputs(
    edits: Sequence[tuple[nn.Module, Callable[[torch.Tensor], torch.Tensor | None]]],
) -> Iterator[None]:
    """While open, each module's output goes through its function, as in ``editing_inputs``; the output is a tensor, or
    a tuple or list that begins with one."""
    with ExitStack() as stack:
        fired = [stack.enter_context(_post_hook(module, edit)) for module, edit in edits]
        yield
        _require_fired(fired, edits)


@contextmanager
def _pre_hook(module: nn.Module, edit: Callable[[torch.Tensor], torch.Tensor | None]) -> Iterator[list[bool]]:
    fired, whose = [False], _turn

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if whose not in (None, _turn):
            return None
        fired[0] = True
        # A block may get its hidden states by position or by name, depending on the family.
        if args:
            new = edit(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        new = edit(kwargs["hidden_states"])
        return None if new is None else (args, {**kwargs, "hidden_states": new})

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield fired
    finally:
        handle.remove()


@contextmanager
def _post_hook(module: nn.Module, edit: Callable[[torch.Tensor], torch.Tensor | None]) -> Iterator[list[bool]]:
    fired, whose = [False], _turn

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        if whose not in (None, _turn):
            return None
        fired[0] = True
        # Blocks return a bare tensor in some families and versions, a tuple or a list in others.
        if isinstance(output, tuple | list):
            new = edit(output[0])
            return None if new is None else [new, *output[1:]] if isinstance(output, list) else (new, *output[1:])
        return edit(output)

    handle = module.register_forward_hook(hook)
    try:
        yield fired
    finally:
        handle.remove()


def _require_fired(fired: list[list[bool]], edits: Sequence[Any]) -> None:
    silent = [type(module).__name__ for (module, _), flag in zip(edits, fired, strict=True) if not flag[0]]
    if silent:
        raise RunError(
            f"{len(silent)} of {len(edits)} hooks never ran ({', '.join(sorted(set(silent)))}): the model does not "
            "call these modules in its forward pass, so what is measured through them would be wrong"
        )
