"""relfv: relation function vectors, one relation at a time, exact, fast and restartable.

Method: Todd, Li, Sharma, Mueller, Wallace and Bau, "Function Vectors in Large Language Models", ICLR 2024.

From Python: ``load`` reads results, ``run`` makes them, a result's ``function_vector`` is applied to any transformers
model, and ``open_model``, ``mean_activations``, ``head_effects`` and ``inject`` are single
steps. Each is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from relfv.api.results import Run as Run
    from relfv.api.results import load as load
    from relfv.api.running import run as run
    from relfv.api.steps import head_effects as head_effects
    from relfv.api.steps import inject as inject
    from relfv.api.steps import mean_activations as mean_activations
    from relfv.api.steps import open_model as open_model
    from relfv.api.vector import FunctionVector as FunctionVector
    from relfv.errors import InputError as InputError
    from relfv.errors import RelfvError as RelfvError
    from relfv.errors import RunError as RunError
    from relfv.errors import UsageWarning as UsageWarning

__version__ = "0.2.0"

ALGORITHM_VERSION = 11
"""Raised when a change in relfv changes the numbers it writes. It is part of every fingerprint, so results of
another algorithm are never mixed; a change that leaves the numbers alone never invalidates anybody's results."""

_FROM = {
    "Run": "api.results",
    "load": "api.results",
    "run": "api.running",
    "head_effects": "api.steps",
    "inject": "api.steps",
    "mean_activations": "api.steps",
    "open_model": "api.steps",
    "FunctionVector": "api.vector",
    "InputError": "errors",
    "RelfvError": "errors",
    "RunError": "errors",
    "UsageWarning": "errors",
}


def __getattr__(name: str) -> Any:
    if name not in _FROM:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"relfv.{_FROM[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_FROM})
