"""Numbers as words: how shares and intervals are written, wherever relfv tells them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from relfv.stats import LEVEL


def percent(share: float) -> str:
    """A share in per cent, never -0: ``12%``."""
    return f"{round(100 * share) + 0}%"


def ci(low: float, high: float, write: Callable[[float], str]) -> str:
    """A confidence interval whose ends ``write`` writes: ``95% CI 0.1 to 0.3``."""
    return f"{LEVEL:.0%} CI {write(low)} to {write(high)}"


def with_interval(share: Mapping[str, Any]) -> str:
    """A share and its interval: ``12% (95% CI 5% to 19%)``."""
    return f"{percent(share['value'])} ({ci(share['low'], share['high'], percent)})"


_SENTENCE_ENDS = re.compile(r"(?<=\.)\s+(?=[A-Z0-9])")


def first_sentence(verdict: str) -> str:
    """The first sentence of a verdict, for a line of a log: the rest is in the file that the verdict is of."""
    return _SENTENCE_ENDS.split(verdict, 1)[0]
