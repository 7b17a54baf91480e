"""Which numbers stand along an axis."""

from __future__ import annotations

import math


def even_ticks(limit: float) -> list[float]:
    """Round numbers between -``limit`` and ``limit``, zero among them."""
    rough = limit / 2
    power = 10.0 ** math.floor(math.log10(rough))
    step = max(size * power for size in (1, 2, 2.5, 5) if size * power <= rough * 1.0001)
    n = int(limit / step + 1e-9)
    return [step * i for i in range(-n, n + 1)]


def whole_ticks(n: int, each: float, apart: float) -> range:
    """Which of ``n`` places, ``each`` so wide, get a label: labels stand at least ``apart`` apart."""
    step = next(step for size in (1, 10, 100, 1000) for step in (size, 2 * size, 5 * size) if step * each >= apart)
    return range(0, n, step)
