"""Several passes of one model in step, block by block, so that weights that stream travel once for all of them.

A pass is a call of the decoder, whose own loop runs the blocks. To stop between two of them it is called twice. The
first time its first block runs, and what each later one is given beside the hidden states (masks, positions) is noted.
Those blocks then run one by one, for one pass after another. The second time every block hands on what the last one
gave, so that what comes after the blocks is the decoder's own as well. The same modules get the same tensors as in a
pass alone, so the bits are the same.

That holds where a decoder hands hidden states from block to block as they are, and nothing else that a block computed:
this is checked, and other models run one pass after another.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from relfv.engine.hooks import called_instead, turn_of


class NotInStep(Exception):
    """Raised for a decoder that cannot run in step: what it does between its blocks would be lost."""


@dataclass(eq=False)
class Waiting:
    """One pass, which waits between blocks for the other passes."""

    blocks: Sequence[nn.Module]
    decode: Callable[[], Any]
    """Calls the decoder."""
    scope: Callable[[int], AbstractContextManager[Any]]
    """Context that is open while this pass runs a layer's block, and not while others do."""
    _given: deque[Callable[[Any], Any]] = field(default_factory=deque)
    """Calls of the later blocks, in order; each runs its block on given hidden states."""
    _output: Any = None
    """Output of the last block that ran."""

    def run(self, layer: int) -> None:
        """Run the block of this layer; layers come in order, from the first on."""
        with turn_of(self), self.scope(layer):
            if layer == 0:
                self._begin()
            else:
                hidden, self._output = _hidden(self._output), None
                self._output = self._given.popleft()(hidden)

    def end(self) -> Any:
        """Return what the decoder gives after the last block."""
        output, self._output = self._output, None
        stand_in = [(block, lambda *_, **__: output) for block in self.blocks]
        with turn_of(self), self.scope(len(self.blocks) - 1), called_instead(stand_in):
            return self.decode()

    def _begin(self) -> None:
        first, *others = self.blocks

        def run(*args: Any, **kwargs: Any) -> Any:
            with called_instead([(first, None)]):
                self._output = first(*args, **kwargs)
            return self._output

        def note(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
            by_name = "hidden_states" in kwargs
            hidden, rest = (kwargs.pop("hidden_states"), args) if by_name else (args[0], args[1:])
            more = self._output[1:] if isinstance(self._output, tuple | list) else ()
            computed = {id(one) for one in more if isinstance(one, torch.Tensor)}
            if hidden is not _hidden(self._output) or any(id(one) in computed for one in (*rest, *kwargs.values())):
                raise NotInStep
            self._given.append(
                (lambda new: block(*rest, hidden_states=new, **kwargs))
                if by_name
                else (lambda new: block(new, *rest, **kwargs))
            )
            return self._output

        with called_instead([(first, run), *((block, partial(note, block)) for block in others)]):
            self.decode()
        if len(self._given) < len(others):
            raise NotInStep


def _hidden(output: Any) -> Any:
    """Hidden states in a block's output: the output itself in some families and versions, the first of a tuple or a
    list in others."""
    return output[0] if isinstance(output, tuple | list) else output
