"""relfv: relation function vectors, one relation at a time, exact, fast and restartable.

Method: Todd, Li, Sharma, Mueller, Wallace and Bau, "Function Vectors in Large Language Models", ICLR 2024.
"""

__version__ = "0.2.0"

ALGORITHM_VERSION = 5
"""Raised when a change in relfv changes the numbers it writes. It is part of every fingerprint, so results of
another algorithm are never mixed; a change that leaves the numbers alone never invalidates anybody's results."""
