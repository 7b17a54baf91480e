"""Putting other functions in the place of modules' own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(forwards: Sequence[tuple[Any, Callable[..., Any] | None]], name: str = "forward") -> Iterator[None]:
    """While open, each module's ``forward``, or the attribute ``name``, is the given function; hooks on the module stay
    in force."""
    # Not by setattr, where every module first looks through its parameters: this is done twice for every pass.
    before = [(vars(module), vars(module).get(name)) for module, _ in forwards]
    try:
        for module, forward in forwards:
            vars(module)[name] = forward
        yield
    finally:
        for attributes, forward in before:
            if forward is None:
                del attributes[name]
            else:
                attributes[name] = forward
