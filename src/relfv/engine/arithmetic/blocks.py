"""Pre-norm blocks, whose residual sums, norms and splitting into pieces run as one kernel each.

Between two products a block reads and writes its hidden states up to five times: sum, norm, pieces. Nothing in these
steps belongs to one module, so they can be fused only where the whole block is known. It is recognised as everything
else is (fusion.py), by what it does: its parts are replaced by functions that are easily told apart, and what comes
out must be what the formula makes of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Container, Set
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from relfv.engine.arithmetic import kernels, late
from relfv.engine.arithmetic.products import Whole
from relfv.engine.arithmetic.replacing import replaced

_PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
_STUB = "relfv_stub"
"""Name of an attention function while a module is looked at."""


class Stream:
    """Memory for the hidden states of copies between blocks: one piece, with room for all copies that the pass will
    have in the end, so that those which are there need not move when others come."""

    def __init__(self, n_copies: int) -> None:
        self._n_copies = n_copies
        self._memory: torch.Tensor | None = None
        _streams.add(self)

    def like(self, x: torch.Tensor) -> torch.Tensor:
        """The place of hidden states (N, C, d) such as these."""
        there = self._memory
        if there is None or (there.device, there.dtype, len(there)) != (x.device, x.dtype, len(x)):
            self._memory = there = x.new_empty(len(x), self._n_copies, x.shape[2])
        return there[:, : x.shape[1]]

    def holds(self, x: torch.Tensor) -> bool:
        """Whether the hidden states ``x`` lie in this memory."""
        there = self._memory
        return there is not None and (there.data_ptr(), there.stride()) == (x.data_ptr(), x.stride())


_streams = WeakSet[Stream]()
"""Streams of the passes that are open: one, as a rule."""


def with_room(x: torch.Tensor, count: int) -> torch.Tensor | None:
    """Hidden states (N, C, d) and the room for ``count`` more after those of each prompt, if they lie in a stream."""
    n, copies, width = x.shape
    if not any(stream.holds(x) for stream in _streams) or x.stride(0) < (copies + count) * width:
        return None
    return x.as_strided((n, copies + count, width), x.stride())


@dataclass(frozen=True)
class PreNorm:
    """Pre-norm block: y + mlp(norm_2(y)), where y = x + attention(norm_1(x)). ``norms`` and ``mlp`` are fusion.py's."""

    module: Any
    out_proj: nn.Linear
    norms: tuple[Any, Any]
    mlp: Any
    may_wait: Set[int] | None
    """Result of ``what_may_wait`` for the block's attention."""

    def forward(
        self, hidden_states: torch.Tensor, *, of_copies: bool = False, stream: Stream | None = None, **given: Any
    ) -> torch.Tensor:
        """Compute what the module does, with the sum after attention and the second norm in one kernel. For copies, the
        result is in their ``stream``."""
        x = hidden_states
        if self._watched():
            return type(self.module).forward(self.module, x, **given)
        norm = self.norms[1]
        attended = self._attend(self.norms[0].forward(x), given, frozenset() if of_copies else None)
        x, normed = kernels.add_norm(x, attended, norm.module.weight, norm.eps, norm.offset)
        written = self.module.mlp(normed)
        return x + written if stream is None else kernels.add(x, written, stream.like(x))

    def forward_in_pieces(self, products: Whole, stream: Stream | None) -> Callable[..., torch.Tensor]:
        """Replacement of ``forward`` where all linear layers of the block multiply in pieces."""
        joined_late = self.may_wait if products.of_copies else None

        def forward(hidden_states: torch.Tensor, **given: Any) -> torch.Tensor:
            x = hidden_states
            if x.dim() != 3 or self._watched():
                return type(self.module).forward(self.module, x, **given)
            return products.pre_norm(
                x,
                lambda x: self._attend(x, given, joined_late),
                self.out_proj,
                [(norm.module.weight, norm.eps, norm.offset) for norm in self.norms],
                (*self.mlp.linears, self.mlp.activation),
                stream and stream.like(x),
            )

        return forward

    def _attend(self, x: torch.Tensor, given: dict[str, Any], joined_late: Set[int] | None) -> torch.Tensor:
        """Output of attention, to be added to the residual stream. With ``joined_late`` rotation waits for attention's
        kernel, and so does joining what these linear layers give, if they may."""
        with nullcontext() if joined_late is None or self.may_wait is None else late.waiting(joined_late):
            return self.module.self_attn(hidden_states=x, **given)[0]

    @cached_property
    def linears(self) -> list[nn.Linear]:
        """All linear layers of the block."""
        return [module for module in self.module.modules() if isinstance(module, nn.Linear)]

    def _watched(self) -> bool:
        """Whether a hook asks for something that is not made here: anything but the input of ``out_proj``."""
        return any(m._forward_hooks or (m is not self.out_proj and m._forward_pre_hooks) for m in self._inside)

    @cached_property
    def _inside(self) -> list[nn.Module]:
        return [module for module in self.module.modules() if module is not self.module]


def as_pre_norm(
    module: Any, out_proj: nn.Module, norms: dict[int, Any], mlps: dict[int, Any], rotaries: Container[Any] = ()
) -> PreNorm | None:
    """The block as a pre-norm one, if it is one of RMS norms in ``norms`` and a gated MLP in ``mlps``, by module id.
    ``rotaries`` are the Python modules whose rotary function has a kernel."""
    first, attention, second, mlp = (getattr(module, name, None) for name in _PARTS)
    known = id(first) in norms and id(second) in norms and id(mlp) in mlps
    known = known and not any("forward" in vars(part) for part in (module, attention))  # replaced by other code
    try:
        if not known or not _is_wired(module) or not _reads_by_linears_alone(attention, out_proj):
            return None
    except Exception:  # as in fusion.py: a module that fails on such inputs, in any way, is another
        return None
    assert isinstance(out_proj, nn.Linear)
    by_kernel = hasattr(attention, "config") and sys.modules.get(type(attention).__module__) in rotaries
    may_wait = what_may_wait(attention, out_proj) if by_kernel else None
    return PreNorm(module, out_proj, (norms[id(first)], norms[id(second)]), mlps[id(mlp)], may_wait)


def _is_wired(module: Any) -> bool:
    """Whether the block puts its four parts together as the formula does, and hands all that it is given to attention,
    and no more."""
    given = {name: torch.zeros(1) for name in ("attention_mask", "position_ids", "position_embeddings")}
    given |= {"past_key_values": torch.zeros(1), "use_cache": torch.zeros(1)}
    handed: dict[str, Any] = {}

    def attend(hidden_states: torch.Tensor, **more: Any) -> tuple[torch.Tensor, None]:
        handed.update(more)
        return hidden_states.cos() + 0.1, None

    x = torch.randn(1, 3, 8)
    stubs = [torch.sin, attend, lambda y: y.sin() - 0.2, lambda y: y.exp() / 3]
    with replaced([(getattr(module, name), stub) for name, stub in zip(_PARTS, stubs, strict=True)]):
        found = type(module).forward(module, x, **given)
    y = x + attend(x.sin())[0]
    same = {name for name in {*given, *handed} if given.get(name) is handed.get(name)}
    return torch.equal(found, y + (y.sin() - 0.2).exp() / 3) and same >= {*given, *handed}


def _reads_by_linears_alone(attention: Any, out_proj: nn.Module) -> bool:
    """Whether attention reads its input through linear layers alone, and returns what ``out_proj`` gives as it is:
    where the outputs of these layers are given, the input may be anything."""
    n_tokens, outcome, read, given = 3, torch.zeros(1), list[torch.Tensor](), list[torch.Tensor]()
    device = next(attention.parameters()).device

    def project(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        given.append(x)
        return torch.ones(1, n_tokens, linear.out_features, device=device)

    def project_out(z: torch.Tensor) -> torch.Tensor:
        read.append(z)
        return outcome

    linears = [m for m in attention.modules() if isinstance(m, nn.Linear) and m is not out_proj]
    angles = torch.ones(1, n_tokens, attention.head_dim, device=device)
    nothing = torch.full((1, n_tokens, linears[0].in_features), torch.nan, device=device)
    stubs: list[Any] = [(linear, partial(project, linear)) for linear in linears]
    with replaced([*stubs, (out_proj, project_out)]):
        found = type(attention).forward(
            attention, hidden_states=nothing, position_embeddings=(angles, angles), attention_mask=None
        )
    as_it_is = all(x is nothing for x in given)
    return as_it_is and found[0] is outcome and len(read) == 1 and bool(read[0].isfinite().all())


def what_may_wait(attention: Any, out_proj: nn.Module) -> frozenset[int] | None:
    """The linear layers, by id, whose outputs ``attention`` hands on as heads, as they are, to the rotary function of
    its file or to softmax; none if it does more with one of them, and None if it does more with what is rotated."""
    n_tokens, seen, read = 3, list[tuple[torch.Tensor, ...]](), list[torch.Tensor]()
    device = next(attention.parameters()).device
    given: dict[int, tuple[nn.Linear, torch.Tensor]] = {}

    def project(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        out = torch.full((1, n_tokens, linear.out_features), torch.nan, device=device)
        given[out.data_ptr()] = linear, out
        return out

    def rotate(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        seen.extend([(q, k), (q.clone(), k.clone())])
        return seen[1]

    def attend(_: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *__: Any, **___: Any) -> Any:
        seen.append((q, k, v))
        return torch.ones(1, n_tokens, q.shape[1], q.shape[3], device=device), None

    def project_out(z: torch.Tensor) -> torch.Tensor:
        read.append(z)
        return z

    linears = [m for m in attention.modules() if isinstance(m, nn.Linear) and m is not out_proj]
    stubs: list[Any] = [*((linear, partial(project, linear)) for linear in linears), (out_proj, project_out)]
    angles = torch.ones(1, n_tokens, attention.head_dim, device=device)
    nothing = torch.full((1, n_tokens, linears[0].in_features), torch.nan, device=device)
    file, implementation = sys.modules[type(attention).__module__], attention.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS[_STUB] = attend
    attention.config._attn_implementation = _STUB
    try:
        # A module that calls its parts in another way, whatever it raises, is something else. PyTorch counts changes in
        # place outside of inference mode alone.
        own = replaced([(file, rotate)], "apply_rotary_pos_emb")
        with torch.inference_mode(False), suppress(Exception), replaced(stubs), own:
            type(attention).forward(
                attention, hidden_states=nothing, position_embeddings=(angles, angles), attention_mask=None
            )
    finally:
        attention.config._attn_implementation = implementation
        del ALL_ATTENTION_FUNCTIONS[_STUB]
    if len(seen) != 3 or len(read) != 1 or not read[0].isfinite().all():
        return None
    before, rotated, attended = seen
    if any(a is not b for a, b in zip(rotated, attended, strict=False)):
        return None
    origins = [_origin(x, given) for x in (*before, attended[2])]
    return frozenset(id(origin) for origin in origins if origin) if all(origins) else frozenset()


def _origin(heads: torch.Tensor, given: dict[int, tuple[nn.Linear, torch.Tensor]]) -> nn.Linear | None:
    """The linear layer whose whole output, unchanged, these heads (1, heads, tokens, head_dim) are."""
    linear, out = given.get(heads.data_ptr(), (None, heads))
    is_whole = heads.numel() == out.numel() and heads.transpose(1, 2).is_contiguous()
    return linear if is_whole and not out._version else None
