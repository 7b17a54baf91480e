"""How much memory this process may still take on the host, and its part of a card that several processes share."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from relfv.models.shared import bytes_shared

if TYPE_CHECKING:
    import torch
    from torch import nn


_OF_DRIVER = 1 << 30
"""Bytes of a card that each process takes beside what PyTorch holds; 0.75 GiB on an H100."""

_most: int | None = None
_n_sharing = 1


def take_at_most(n_bytes: int | None) -> None:
    """Count no more than ``n_bytes`` as available: each of the processes that open models side by side may take its
    part."""
    global _most
    _most = n_bytes


def share_cards(processes: int, cards: Iterable[torch.device] = ()) -> None:
    """Count on an equal part of each card from now on, one for each of ``processes``. More cannot be taken of
    ``cards``: PyTorch gives back what it only keeps before it does, and no process runs out of memory through
    another."""
    global _n_sharing
    _n_sharing = processes
    for card in cards:
        if card.type == "cuda":
            import torch

            part = bytes_of_card(card)
            held = max(part - _OF_DRIVER, part // 2)
            torch.cuda.set_per_process_memory_fraction(held / (part * processes), card)


def processes_a_card() -> int:
    """Number of processes that share each card."""
    return _n_sharing


def bytes_of_card(card: torch.device) -> int:
    """This process's part of a CUDA device: a function of the device and of how many share it, never of what is free,
    since the size of passes follows from it, and from that low-order bits."""
    import torch

    return torch.cuda.get_device_properties(card).total_memory // _n_sharing


def available_bytes(*, to_share: bool = False) -> int | None:
    """Bytes that this process may still take: what the machine has free, or what the process's control group (a Slurm
    job, a container) leaves of it, the smaller; None where neither is said (not on Linux). With ``to_share``, for what
    all processes that open models side by side have in common: what of it is there already counts as free."""
    there = bytes_shared() if to_share else None
    limits = [_most if there is None else None, _of_machine(), *map(_of_group, _groups())]
    return min((limit + (there or 0) for limit in limits if limit is not None), default=None)


def fits_widened(model: nn.Module) -> bool:
    """Whether there is room for twice what float32 weights take beyond the loaded ones of 16 bits."""
    free = available_bytes()
    return free is not None and free > 4 * sum(p.numel() for p in model.parameters())


def _of_machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _groups() -> list[Path]:
    """The folders of the process's memory control groups, v2 and v1, and of the groups around them."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    groups: list[Path] = []
    for line in lines:
        _, controllers, inside = line.split(":", 2)
        if controllers in ("", "memory"):
            root = Path("/sys/fs/cgroup", controllers)
            group = root / inside.strip("/")
            groups += [group, *(parent for parent in group.parents if root in (parent, *parent.parents))]
    return groups


def _of_group(group: Path) -> int | None:
    for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        try:
            return int((group / limit).read_text()) - int((group / used).read_text()) + _page_cache(group)
        except (OSError, ValueError):  # not this version of control groups, or no limit ("max")
            continue
    return None


def _page_cache(group: Path) -> int:
    """Bytes of a group's memory that hold parts of files, and are given back on demand."""
    try:
        lines = [line.split() for line in (group / "memory.stat").read_text().splitlines()]
    except OSError:
        return 0
    # v2 counts the groups inside as well, v1 does so by names of their own.
    found = {name: int(n_bytes) for name, n_bytes in lines}
    return sum(found.get(f"total_{name}", found.get(name, 0)) for name in ("inactive_file", "active_file"))
