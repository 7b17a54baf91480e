"""Attention of copies in plain PyTorch: the formula of engine/attention.py, and what its kernel is compared with."""

from __future__ import annotations

import torch


def attend_plainly(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    k_prefix: torch.Tensor,
    v_prefix: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    key_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Shapes as in ``Arithmetic.attend``.

    Scores are multiplied by ``scale`` and capped at ``softcap``; ``window`` counts the positions that the last token
    sees, its own included. ``sinks`` holds one logit a head, (heads,); ``key_bias`` is ALiBi by the key's position,
    float32 (heads, P + 1).
    """
    n, n_heads, copies, head_dim = query.shape
    kv_heads = key.shape[1]
    group = n_heads // kv_heads

    # float32 throughout: scores of a bf16 model would otherwise be rounded to 8 bits before the softmax.
    q = query.float().reshape(n, kv_heads, group * copies, head_dim)
    scores = _capped(q @ k_prefix.float().transpose(-1, -2) * scale, softcap)
    if key_bias is not None:
        by_head = scores.view(n, n_heads, copies, -1) + _relative_to_own(key_bias, lengths)
        scores = by_head.view_as(scores)
    scores = scores.masked_fill(~_visible(lengths, scores.shape[-1], window), -torch.inf)
    # Finite also where a window of one token hides the whole prefix.
    lse = scores.logsumexp(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
    o_prefix = (scores - lse).exp() @ v_prefix.float()

    # A group's queries share the own key and value, which are never laid out for each of them.
    of_group = (n, kv_heads, group, copies)
    s_own = (q.view(*of_group, head_dim) * key.float()[:, :, None]).sum(-1)
    s_own = _capped(s_own.view_as(lse) * scale, softcap)
    weight = torch.sigmoid(s_own - lse).view(*of_group, 1)
    out = torch.lerp(o_prefix.view(*of_group, -1), value.float()[:, :, None], weight)
    out = out.view(n, n_heads, copies, -1)
    if sinks is not None:
        total = torch.logaddexp(lse, s_own).reshape(n, n_heads, copies, 1)
        out = out * torch.sigmoid(total - sinks.float().view(1, n_heads, 1, 1))
    return out.transpose(1, 2).to(value.dtype).contiguous()


def _visible(lengths: torch.Tensor, width: int, window: int | None) -> torch.Tensor:
    """bool (N, 1, 1, width): prefix positions that the last token, at position lengths[n], may attend to."""
    position = torch.arange(width, device=lengths.device)[None]
    last = lengths[:, None]
    seen = position < last
    if window is not None:
        seen &= position > last - window
    return seen[:, None, None]


def _relative_to_own(key_bias: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """float32 (N, heads, 1, P): a softmax does not change when the own key's bias is subtracted from all of them."""
    own = key_bias[:, lengths].T[:, :, None]
    return (key_bias[:, :-1] - own)[:, :, None]


def _capped(scores: torch.Tensor, softcap: float | None) -> torch.Tensor:
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)
