"""Finding the modules of a model that have a kernel, and putting the kernels in their place while a pass runs.

A module is recognised by what it computes, not by its class: it is run on random numbers beside the formula that the
kernel implements, and keeps its own code unless the two agree. So an unknown family gets the kernels that fit it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from relfv.engine.arithmetic import kernels, late
from relfv.engine.arithmetic.blocks import PreNorm, Stream, as_pre_norm
from relfv.engine.arithmetic.products import Whole
from relfv.engine.arithmetic.replacing import replaced
from relfv.models.architecture import Architecture
from relfv.models.packed import is_readable, unpacked_product, weight_dtype
from relfv.models.streaming import brought

_AGREE = 1e-5
_SIZES = (1e-3, 1.0, 100.0)
"""Sizes of the random inputs: a norm's epsilon shows on small ones, a clamp on large ones."""

_FORMULAS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
}


@dataclass(frozen=True)
class Norm:
    """RMS norm: x / rms(x) * (weight + offset)."""

    module: Any
    eps: float
    offset: float

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute what the module does, in one kernel."""
        return kernels.rms_norm(x, self.module.weight, self.eps, self.offset)


@dataclass(frozen=True)
class GatedMLP:
    """Gated MLP: down(act(gate(x)) * up(x))."""

    module: Any
    activation: str

    @property
    def linears(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        """The linear layers gate, up and down."""
        return self.module.gate_proj, self.module.up_proj, self.module.down_proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute what the module does, with the elementwise part in one kernel."""
        gate, up, down = self.linears
        return down(kernels.gate(gate(x), up(x), self.activation))

    def forward_in_pieces(self, products: Whole) -> Callable[[torch.Tensor], torch.Tensor]:
        """Replacement of ``forward`` where all linear layers of the MLP multiply in pieces, and gate and up stay in
        them."""
        return lambda x: products.gated(*self.linears, self.activation, x) if x.dim() == 3 else self.forward(x)


@dataclass(frozen=True)
class Fusions:
    """Modules and functions of one model that were recognised as having a kernel."""

    norms: tuple[Norm, ...] = ()
    mlps: tuple[GatedMLP, ...] = ()
    activations: tuple[tuple[nn.Module, str], ...] = ()
    """Activations written out in several operations (GPT-J's), and PyTorch's own function of the same formula."""
    rotaries: tuple[Any, ...] = ()
    """Python modules whose ``apply_rotary_pos_emb`` rotates halves."""

    blocks: tuple[PreNorm, ...] = ()

    def forwards(
        self, products: Whole, in_pieces: Sequence[nn.Linear], stream: Stream | None = None
    ) -> list[tuple[nn.Module, Callable[..., torch.Tensor]]]:
        """Replacements of the MLPs and blocks whose linear layers are all ``in_pieces``; for copies, of all blocks."""
        known = {id(linear) for linear in in_pieces}
        blocks = [(block, known.issuperset(map(id, block.linears))) for block in self.blocks]
        return [
            *(
                (mlp.module, mlp.forward_in_pieces(products))
                for mlp in self.mlps
                if known.issuperset(map(id, mlp.linears))
            ),
            *((block.module, block.forward_in_pieces(products, stream)) for block, fits in blocks if fits),
            *(
                (block.module, partial(block.forward, of_copies=True, stream=stream))
                for block, fits in blocks
                if products.of_copies and not fits
            ),
        ]

    @contextmanager
    def installed(self) -> Iterator[None]:
        """While open, the kernels replace what was recognised."""
        parts = (*self.norms, *self.mlps, *self.blocks)
        with ExitStack() as stack:
            stack.enter_context(replaced([(part.module, part.forward) for part in parts]))
            stack.enter_context(replaced([(module, _FORMULAS[name]) for module, name in self.activations]))
            rotations = [(file, _rotation_by_kernel(file.apply_rotary_pos_emb)) for file in self.rotaries]
            stack.enter_context(replaced(rotations, "apply_rotary_pos_emb"))
            yield


def recognise(model: nn.Module, arch: Architecture) -> Fusions | None:
    """Find what kernels can replace in ``model``, which must be on the device where it will run. None where kernels
    cannot run."""
    if not kernels.usable(arch.lm_head.weight):  # type: ignore[arg-type]
        return None
    device = arch.device
    packed = [(module, partial(unpacked_product, module)) for module in model.modules() if is_readable(module)]
    on_device = torch.cuda.device(device)
    with torch.inference_mode(), torch.random.fork_rng(devices=[device]), on_device, replaced(packed):
        torch.manual_seed(0)
        candidates = [module for module in model.modules() if "forward" not in vars(module)]
        norms = [norm for module in candidates if (norm := as_norm(module, device))]
        mlps = [mlp for module in candidates if (mlp := as_gated_mlp(module, device))]
        activations = [(module, name) for module in candidates if (name := as_activation(module, device))]
        namespaces = {sys.modules.get(type(module).__module__) for module in arch.blocks[0].modules()}
        rotaries = [namespace for namespace in namespaces if rotates_halves(namespace, arch)]
        known_norms, known_mlps = ({id(part.module): part for part in parts} for parts in (norms, mlps))
        # Where only part of a head is rotated, the family's own function does it, and rotation may not wait.
        widths = {2 * len(of) for name, of in model.named_buffers() if name.endswith("inv_freq")}
        whole = rotaries if widths <= {arch.head_dim} else []
        found = [
            as_pre_norm(arch.blocks[layer], out, known_norms, known_mlps, whole)
            for layer, out in arch.out_projs.items()
        ]
        blocks = [block for block in found if block]
    return Fusions(tuple(norms), tuple(mlps), tuple(activations), tuple(rotaries), tuple(blocks))


def as_norm(module: Any, device: torch.device) -> Norm | None:
    """The module, which runs on ``device``, as an RMS norm, if it is one."""
    weight = dict(module.named_parameters(recurse=False))
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if list(weight) != ["weight"] or weight["weight"].dim() != 1 or not isinstance(eps, float):
        return None
    x = torch.randn(2, 3, len(weight["weight"]), device=device)
    for offset in (0.0, 1.0):

        def formula(x: torch.Tensor, offset: float = offset) -> torch.Tensor:
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (weight["weight"].float() + offset)

        with brought(module, device):
            same = _same(module, formula, [size * x for size in _SIZES])
        if same:
            return Norm(module, eps, offset)
    return None


def as_gated_mlp(module: Any, device: torch.device) -> GatedMLP | None:
    """The module, which runs on ``device``, as a gated MLP of linear layers, if it is one."""
    parts: list[Any] = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    activate: Any = getattr(module, "act_fn", None)
    if not all(type(part) is nn.Linear or is_readable(part) for part in parts) or activate is None:
        return None
    gate, up, down = parts
    x = torch.randn(1, 2, gate.in_features, device=device, dtype=weight_dtype(gate))
    with brought(module, device):
        same = _same(module, lambda x: down(activate(gate(x)) * up(x)), [size * x for size in _SIZES])
    if not same:
        return None
    name = _formula_of(activate, device)
    return GatedMLP(module, name) if name else None


def as_activation(module: nn.Module, device: Any) -> str | None:
    """The formula that one of transformers' activation modules computes."""
    return _formula_of(module, device) if type(module).__module__ == "transformers.activations" else None


def _formula_of(activate: Callable[[torch.Tensor], torch.Tensor], device: Any) -> str | None:
    spreads = [torch.linspace(-far, far, 257, device=device) for far in (8, 200)]
    return next((name for name, formula in _FORMULAS.items() if _same(activate, formula, spreads)), None)


def rotates_halves(namespace: Any, arch: Architecture) -> bool:
    """True if the file's rotary function pairs each entry of a head's first half with one of its second."""
    rotate = getattr(namespace, "apply_rotary_pos_emb", None)
    if rotate is None or arch.head_dim % 2:
        return False
    device = arch.device
    q, k = torch.randn(2, 1, 2, 3, arch.head_dim, device=device)
    cos, sin = torch.randn(2, 1, 3, arch.head_dim, device=device)
    return _same(
        lambda both: torch.stack(rotate(*both, cos, sin)),
        lambda both: torch.stack([_rotated(x, cos, sin) for x in both]),
        [torch.stack([q, k])],
    )


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]


def _rotation_by_kernel(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replacement of the rotary function ``original`` by a kernel. It is not a module: its name in the family's file is
    bound to the kernel."""

    def rotate(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *more: Any, **named: Any) -> Any:
        if more or named or q.dim() != 4 or cos.dim() != 3 or cos.shape[-1] != q.shape[-1]:
            return original(q, k, cos, sin, *more, **named)
        return (q, k) if late.rotates(cos, sin) else kernels.rotate(q, k, cos, sin)

    return rotate


def _same(module: Any, formula: Callable[[torch.Tensor], torch.Tensor], inputs: list[torch.Tensor]) -> bool:
    """Whether ``module`` computes ``formula``; one that cannot take such inputs, whatever it raises, does not."""
    try:
        return all(_agree(module(x), formula(x)) for x in inputs)
    except Exception:
        return False


def _agree(given: torch.Tensor, expected: torch.Tensor) -> bool:
    if not expected.isfinite().all():  # float16, from large inputs
        return torch.equal(given.nan_to_num(), expected.nan_to_num())
    return given.shape == expected.shape and bool((given - expected).float().norm() <= _AGREE * expected.float().norm())
