"""The fused kernels against the plain PyTorch that they stand in for.

They run where Triton does: on CUDA, or anywhere with Triton installed and TRITON_INTERPRET=1.
"""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F

from relfv.engine.arithmetic import kernels
from relfv.engine.arithmetic.attention import attend_plainly
from relfv.engine.arithmetic.products import FLOAT32, Differences, Pieces, Whole, split

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(
    not kernels.AVAILABLE or not (INTERPRETED or torch.cuda.is_available()), reason="needs Triton and a GPU"
)
DEVICE = "cpu" if INTERPRETED else "cuda"
ACTIVATIONS = ("silu", "gelu_tanh", "gelu")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """On the device, and different for different shapes and seeds."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE)


def plainly(function, *tensors):  # type: ignore[no-untyped-def]
    """On the CPU, where no kernel runs."""
    return function(*(tensor.cpu() if isinstance(tensor, torch.Tensor) else tensor for tensor in tensors)).to(DEVICE)


def test_split_gives_the_same_pieces() -> None:
    x = random(7, 300) * torch.logspace(-6, 4, 300, device=DEVICE)
    pieces = kernels.split_differences(x[None], 3, 0)
    torch.testing.assert_close(pieces[:21].view(3, 7, 300).float().sum(0), x, rtol=2**-21, atol=0)
    assert_same_pieces(pieces, plainly(split, x, 3))


@pytest.mark.parametrize("n", [1, 7, 128, 300])
def test_rows_to_multiply_come_in_whole_tiles(n: int) -> None:
    """Or the library would look for its way anew for each number of prompts."""
    x, weight = random(1, n, 32), random(32)
    rows = [
        kernels.split_differences(x, 2, 3),
        kernels.norm_differences(x, weight, 1e-5, 0.0, 2, 3)[1],
        kernels.gate_differences(*2 * [torch.zeros(384, 32, device=DEVICE)], None, None, "silu", 1, n, 1, 0),
    ]
    assert all(len(some) % 128 == 0 and len(some) >= n for some in rows)


def assert_same_pieces(found: torch.Tensor, expected: torch.Tensor) -> None:
    """To the bit, except under the interpreter, which cuts to bf16 instead of rounding."""
    if not INTERPRETED:
        assert torch.equal(found[: len(expected)], expected)


@pytest.mark.parametrize("pieces", [Pieces(), FLOAT32])
@pytest.mark.parametrize("shape", [(3, 37, 300), (1, 1, 16), (2, 16, 256)])
def test_differences_are_split_and_joined_the_same(pieces: Pieces, shape: tuple[int, int, int]) -> None:
    x = random(*shape) + 5 * random(shape[0], 1, shape[2], seed=1)
    plain = Differences(pieces)
    rows = kernels.split_differences(x, pieces.difference, pieces.base)
    assert_same_pieces(rows, plainly(plain.split, x))
    if pieces == FLOAT32:
        joined = plainly(plain.join, rows.float(), None, x.shape)
        torch.testing.assert_close(joined, x, rtol=1e-6, atol=1e-6)
    bias = random(shape[2], seed=2).bfloat16()
    for some in (None, bias):
        expected = plainly(plain.join, rows.float(), some, x.shape)
        found = kernels.join_differences(rows.float(), some, shape[0], shape[1], pieces.difference, pieces.base)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gates_agree(activation: str) -> None:
    formula = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}[activation]
    gate, up = 4 * random(3, 5, 300), random(3, 5, 300, seed=1)
    torch.testing.assert_close(kernels.gate(gate, up, activation), formula(gate) * up, rtol=1e-5, atol=1e-5)
    half = kernels.gate(gate.bfloat16(), up.bfloat16(), activation)
    torch.testing.assert_close(half, (formula(gate) * up).bfloat16(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("biased", [False, True])
def test_gating_pieces_equals_gating_what_they_stand_for(activation: str, biased: bool) -> None:
    formula = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}[activation]
    n, c, d = 3, 37, 300
    pieces = FLOAT32
    plain = Differences(pieces)
    gate = 3 * random(n, 1, d) + 0.1 * random(n, c, d)
    up = random(n, 1, d, seed=1) + 0.1 * random(n, c, d, seed=2)
    gate_bias, up_bias = (random(d, seed=3), random(d, seed=4)) if biased else (None, None)
    rows = [plainly(plain.split, x).float() for x in (gate, up)]
    found = kernels.gate_differences(*rows, gate_bias, up_bias, activation, n, c, pieces.difference, pieces.base)
    joined = plainly(plain.join, found.float(), None, gate.shape)
    expected = formula(gate + (gate_bias if biased else 0)) * (up + (up_bias if biased else 0))
    torch.testing.assert_close(joined, expected, rtol=1e-5, atol=1e-5)


def test_a_copy_that_is_the_base_stays_the_base_to_the_bit() -> None:
    n, c, d = 2, 20, 300
    gate, up = random(n, 1, d).expand(n, c, d).contiguous(), random(n, 1, d, seed=1).expand(n, c, d).contiguous()
    rows = [kernels.split_differences(x, 1, 3).float() for x in (gate, up)]
    out = kernels.gate_differences(*rows, None, None, "silu", n, c, 1, 3)
    joined = kernels.join_differences(out.float(), None, n, c, 1, 3)
    assert torch.equal(joined, joined[:, :1].expand_as(joined))


@pytest.mark.parametrize("base", [0, 3])
@pytest.mark.parametrize("biased", [False, True])
def test_sums_and_their_norms_in_pieces(base: int, biased: bool) -> None:
    n, c, d = 2, 19, 300
    plain = Differences(FLOAT32) if base else Whole(3)
    x, added, weight = (random(n, 1, d) + 0.1 * random(n, c, d, seed=seed) for seed in (1, 2, 3))
    weight, bias = weight[0, 0], random(d, seed=4) if biased else None
    for change in (None, added):
        raw = None if change is None else plainly(plain.split, change).float()
        sums = x if change is None else x + change + (0 if bias is None else bias)
        laid = x if base else x.reshape(1, n * c, d)
        given = {} if raw is None else {"added": raw.clone(), "bias": bias}
        found, rows = kernels.norm_differences(laid, weight, 1e-5, 1.0, 3, base, **given)
        torch.testing.assert_close(found.view_as(x), sums, rtol=1e-6, atol=1e-6)
        expected = sums * torch.rsqrt(sums.pow(2).mean(-1, keepdim=True) + 1e-5) * (weight + 1)
        joined = plainly(plain.join, rows.float(), None, x.shape)
        torch.testing.assert_close(joined, expected, rtol=1e-5, atol=1e-5)
        if raw is not None:
            onto = kernels.join_differences(raw, bias, *laid.shape[:2], 3, base, onto=laid)
            torch.testing.assert_close(onto.view_as(x), sums, rtol=1e-6, atol=1e-6)


def test_padding_is_left_out() -> None:
    n, d, places = 11, 300, torch.tensor([0, 1, 4, 5, 6, 9], device=DEVICE)
    x, added, weight = random(1, n, d), random(len(places) * 3, d, seed=1), random(300, seed=1)
    rows = kernels.split_differences(x, 3, 0, places)
    n_rows = 3 * len(places)
    assert torch.equal(rows[:n_rows], kernels.split_differences(x[:, places], 3, 0)[:n_rows])
    for change in ({}, {"added": added}):
        found, expected = (
            kernels.norm_differences(y, weight, 1e-5, 0.0, 3, 0, **{k: v.clone() for k, v in change.items()}, places=at)
            for y, at in ((x, places), (x[:, places], None))
        )
        assert torch.equal(found[1][:n_rows], expected[1][:n_rows])
    assert torch.equal(found[0], expected[0])
    into = torch.zeros_like(x)
    joined = kernels.join_differences(rows.float(), None, 1, len(places), 3, 0, into=into, places=places)
    assert torch.equal(joined[:, places], kernels.join_differences(rows.float(), None, 1, len(places), 3, 0))
    assert joined.abs().sum(2).count_nonzero() == len(places)


def test_hidden_states_may_have_room_between_prompts() -> None:
    n, c, d = 2, 19, 300
    x, added, weight = random(n, c, d), random(n, c, d, seed=1), random(300, seed=1)
    room = torch.full((n, c + 7, d), torch.nan, device=DEVICE)
    inside = room[:, :c]
    assert kernels.add(x, added, inside) is inside
    torch.testing.assert_close(inside, x + added)
    torch.testing.assert_close(
        kernels.rms_norm(inside, weight, 1e-5, 1.0), kernels.rms_norm(x + added, weight, 1e-5, 1.0)
    )
    raw = [random(n * c + 3 * n, d, seed=2) for _ in range(2)]
    joined = kernels.join_differences(raw[0], None, n, c, 1, 3, onto=x, into=inside)
    assert torch.equal(joined, kernels.join_differences(raw[1], None, n, c, 1, 3, onto=x))
    for found, expected in zip(
        *(
            kernels.norm_differences(y, weight, 1e-5, 0.0, 1, 3)
            for y in (inside, inside.clone(memory_format=torch.contiguous_format))
        ),
        strict=True,
    ):
        assert torch.equal(found[: n * (c + 3)], expected[: n * (c + 3)])
    assert room[:, c:].isnan().all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gating_pieces_without_a_base(activation: str) -> None:
    formula = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}[activation]
    gate, up = 3 * random(19, 300), random(19, 300, seed=1)
    rows = [plainly(Whole(2).split, x).float() for x in (gate, up)]
    found = kernels.gate_differences(*rows, None, None, activation, 1, 19, 2, 0)
    joined = plainly(Whole(2).join, found.float(), None, gate.shape)
    torch.testing.assert_close(joined, formula(gate) * up, rtol=1e-4, atol=1e-4)


def test_a_sum_and_its_norm() -> None:
    x, added, weight = random(2, 5, 300).bfloat16(), random(2, 5, 300, seed=1).bfloat16(), random(300, seed=1)
    sums, normed = kernels.add_norm(x, added, weight, 1e-5, 0.0)
    torch.testing.assert_close(sums, x + added, rtol=2**-7 if INTERPRETED else 0, atol=0)
    torch.testing.assert_close(normed, kernels.rms_norm(sums, weight, 1e-5, 0.0), rtol=0, atol=0)


def test_norms_of_copies_that_are_the_base_are_the_bases_to_the_bit() -> None:
    n, c, d = 2, 20, 300
    x, added = (random(n, 1, d, seed=seed).expand(n, c, d).contiguous() for seed in (0, 1))
    raw = kernels.split_differences(added, 1, 3).float()
    sums, rows = kernels.norm_differences(x, random(d, seed=2), 1e-5, 0.0, 1, 3, added=raw)
    joined = kernels.join_differences(rows.float(), None, n, c, 1, 3)
    for found in (sums, joined):
        assert torch.equal(found, found[:, :1].expand_as(found))


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(offset: float) -> None:
    x, weight = random(2, 5, 300), random(300, seed=1)
    expected = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * (weight + offset)
    torch.testing.assert_close(kernels.rms_norm(x, weight, 1e-5, offset), expected, rtol=1e-5, atol=1e-5)
    half = kernels.rms_norm(x.bfloat16(), weight.bfloat16(), 1e-5, offset)
    torch.testing.assert_close(half.float(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("copies", [1, 5])
@pytest.mark.parametrize("heads", [3, 4])
def test_rotary_embedding(copies: int, heads: int) -> None:
    q, k = (random(2, 5, n, 20, seed=n).transpose(1, 2) for n in (heads, 2))
    cos, sin = random(2, copies, 20, seed=1), random(2, copies, 20, seed=2)
    for x, found in zip((q, k), kernels.rotate(q, k, cos, sin), strict=True):
        first, second = x.chunk(2, dim=-1)
        expected = x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 7, 40])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16])
def test_attention(window: int | None, softcap: float | None, sinks: bool, dtype: torch.dtype) -> None:
    n, heads, kv_heads, copies, prefix, head_dim = 3, 6, 2, 70, 45, 20
    q = random(n, copies, heads, head_dim).to(dtype).transpose(1, 2)
    k = random(n, copies, kv_heads, head_dim, seed=1).to(dtype).transpose(1, 2)
    v = random(n, copies, kv_heads, head_dim, seed=2).to(dtype).transpose(1, 2)
    k_prefix, v_prefix = (random(n, kv_heads, prefix, head_dim, seed=seed).to(dtype) for seed in (3, 4))
    lengths = torch.tensor([45, 1, 33], device=DEVICE)
    settings = {"scale": 0.3, "window": window, "softcap": softcap, "sinks": random(heads) if sinks else None}
    found = kernels.attend(q, k, v, k_prefix, v_prefix, lengths, **settings)  # type: ignore[arg-type]
    expected = attend_plainly(q, k, v, k_prefix, v_prefix, lengths, **settings)  # type: ignore[arg-type]
    tolerance = 2e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


DTYPES = [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16]
UNCAPPED = {"scale": 0.3, "window": None, "softcap": None, "sinks": None}


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_whole_prompts(window: int | None, dtype: torch.dtype) -> None:
    n, heads, kv_heads, tokens, head_dim = 2, 6, 2, 45, 20
    q, k, v = (
        random(n, tokens, some, head_dim, seed=seed).to(dtype).transpose(1, 2)
        for seed, some in enumerate((heads, kv_heads, kv_heads))
    )
    found = kernels.attend(q, k, v, k, v, None, **{**UNCAPPED, "window": window})  # type: ignore[arg-type]
    at = torch.arange(tokens, device=DEVICE)
    seen = (at <= at[:, None]) & (at > at[:, None] - (window or tokens))
    k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=0.3).transpose(1, 2)
    tolerance = 2e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "based"), [(torch.float32, True), *((dtype, False) for dtype in DTYPES)], ids=str)
@pytest.mark.parametrize("shared_angles", [False, True])
def test_attention_that_rotates_and_joins_itself(dtype: torch.dtype, based: bool, shared_angles: bool) -> None:
    n, heads, kv_heads, copies, prefix, head_dim = 2, 6, 2, 30, 45, 20
    given = [
        random(n, copies, some, head_dim, seed=seed).to(dtype).transpose(1, 2)
        for seed, some in enumerate((heads, kv_heads, kv_heads))
    ]
    bases = [random(n, x.shape[1], 1, head_dim, seed=seed).to(dtype) for seed, x in enumerate(given)] if based else None
    prefixes = [random(n, kv_heads, prefix, head_dim, seed=seed).to(dtype) for seed in (3, 4)]
    lengths = torch.tensor([45, 33], device=DEVICE)
    cos, sin = (random(1 if shared_angles else n, 1, head_dim, seed=seed).to(dtype) for seed in (5, 6))
    q, k, v = given if bases is None else [x + base for x, base in zip(given, bases, strict=True)]
    expected = kernels.attend(*kernels.rotate(q, k, cos, sin), v, *prefixes, lengths, **UNCAPPED)  # type: ignore[arg-type]
    if bases:
        bases[:2] = kernels.rotate(bases[0], bases[1], cos, sin)
    found = kernels.attend(*given, *prefixes, lengths, **UNCAPPED, angles=(cos, sin), bases=bases)  # type: ignore[arg-type]
    tolerance = 2e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("shared_base", [False, True])
def test_reading_out(softcap: float | None, shared_base: bool) -> None:
    n, copies, vocabulary = 3, 4, 9001
    raw, base = random(n * copies, vocabulary), random(1 if shared_base else n, vocabulary, seed=1)
    targets = torch.tensor([17, 9000, 0], device=DEVICE)
    raw[3, 8000] = raw[3, 4000] = 50.0 if softcap is None else 5.0
    if shared_base or softcap is None:
        base[:, 8000] = base[:, 4000]
    start = 2
    found = kernels.read(raw[start:], base, targets, row_0=start, n_copies=copies, scale=0.5, softcap=softcap)
    prompt = torch.arange(start, n * copies, device=DEVICE) // copies
    logits = (raw[start:] + base[0 if shared_base else prompt]) * 0.5
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    picked = logits.gather(1, targets[prompt, None])[:, 0]
    torch.testing.assert_close(found[0], picked, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1], picked - logits.logsumexp(1), rtol=1e-5, atol=1e-5)
    assert torch.equal(logits.gather(1, found[2][:, None])[:, 0], logits.max(1).values)
    if softcap is None:
        assert found[2][1] == 4000
