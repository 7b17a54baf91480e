"""The settings of a run, the spec's hard constraints, and the fingerprint of a result."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from relfv import ALGORITHM_VERSION
from relfv.errors import InputError

SPEC_CSV = Path("datasets/relation/relationA_ex.csv")
SCORE_KEYS = tuple(f"mean_{kind}delta_{m}" for kind in ("", "abs_") for m in ("p", "logit", "logprob"))
"""What heads may be ranked by."""
MOST = 100_000
"""Of trials, demos, heads, prompts: more is a slip, and would be noticed only when the memory is full."""
MAX_SEED = 2**63 - 1
"""What other readers of the JSON files can hold."""
_MAX_ALPHA = 1e6
"""Beyond it models compute nothing but overflow."""
DEFAULT_OUT_ROOT = Path("results_fv/relation_qwise")


@dataclass(frozen=True)
class Settings:
    """Everything that the numbers of a q_id depend on, besides its rows. Defaults are the spec's section 2."""

    model: str = "meta-llama/Llama-3.1-8B"
    """``demo``, a local folder, or a hub id."""
    model_spec: str = "llama3"
    """Model family: where blocks and output projections are. ``auto`` reads it from the model's config."""
    device: str = "auto"
    """``auto`` (CUDA if there is one), ``cpu``, ``cuda``, ``cuda:<n>`` or ``mps``."""
    dtype: str = "auto"
    """dtype the weights are kept in; ``auto`` is the checkpoint's own."""
    quant: str = "none"
    """``none``, ``8bit`` or ``4bit`` (bitsandbytes)."""
    precision: str = "exact"
    """``exact``: float32 arithmetic (on CUDA with products from bf16 pieces, or TF32). ``fast``: the weights' dtype, float32
    logits."""
    seed: int = 0
    """Seed of the trials."""
    relation_csv_path: str = str(SPEC_CSV)
    """The relation CSV."""
    n_trials_per_q: int = 25
    """Trials sampled for each q_id."""
    n_demos: int = 9
    """Demonstrations in a prompt."""
    corruption: str = "derange"
    """``derange``: no demo keeps its right label where possible. ``shuffle``: the paper's plain permutation."""
    layers: str = "all"
    """Layers swept in StepD: ``all``, or numbers and ranges like ``0-3,7``."""
    heads: str = "all"
    """Heads swept in each of those layers, likewise."""
    score_key: str = "mean_delta_p"
    """What heads are ranked by, and layers compared by."""
    topk: int = 20
    """Heads in the function vector."""
    alpha: float = 1.0
    """The vector is added alpha times."""
    n_eval: int = 50
    """Zero-shot prompts evaluated at most."""
    allow_query_duplicates: bool = False
    """Evaluate every trial's query, also those drawn more than once."""
    trust_remote_code: bool = False
    """Run code that comes with the checkpoint."""
    alpha_sweep: tuple[float, ...] = ()
    """Also add the vector so many times, at every layer; in a file of its own. In a status: what has been swept, or is."""
    k_sweep: tuple[int, ...] = ()
    """Also add the vectors of so many best heads, likewise."""

    def __post_init__(self) -> None:
        for name in ("n_trials_per_q", "n_demos", "topk", "n_eval"):
            require_within(f"--{name}", getattr(self, name), 1, MOST)
        require_within("--seed", self.seed, 0, MAX_SEED)
        if self.score_key not in SCORE_KEYS:
            raise InputError(f"--score_key {self.score_key!r}: expected one of {', '.join(SCORE_KEYS)}")
        for k in self.k_sweep:
            require_within("--k_sweep", k, 1, MOST)
        for flag, alphas in (("--alpha", (self.alpha,)), ("--alpha_sweep", self.alpha_sweep)):
            for alpha in alphas:
                if not abs(alpha) <= _MAX_ALPHA:  # so written that NaN fails too
                    raise InputError(
                        f"{flag} {alpha}: expected a finite number between {-_MAX_ALPHA:g} and {_MAX_ALPHA:g}"
                    )

    @property
    def sweeps(self) -> bool:
        """Whether other alphas or k are asked for."""
        return bool(self.alpha_sweep or self.k_sweep)

    def with_sweeps_of(self, other: Settings) -> Settings:
        """With its own sweeps and those of ``other``: what has been swept once stays."""
        return replace(
            self,
            alpha_sweep=tuple(sorted({*self.alpha_sweep, *other.alpha_sweep})),
            k_sweep=tuple(sorted({*self.k_sweep, *other.k_sweep})),
        )

    def departures(self) -> list[str]:
        """In what these settings depart from the spec's hard constraints (section 2), in words."""
        spec = Settings()
        found = [
            f"{name} is {getattr(self, name)}, the spec fixes {getattr(spec, name)}"
            for name in ("topk", "n_trials_per_q", "n_demos", "layers", "heads")
            if getattr(self, name) != getattr(spec, name)
        ]
        if Path(self.relation_csv_path) != SPEC_CSV:
            found.append(f"relation_csv_path is {self.relation_csv_path}, the spec fixes {SPEC_CSV}")
        return found

    def to_json(self) -> dict[str, Any]:
        """As a plain dict, in the order above."""
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> Settings:
        """The inverse of ``to_json``; keys of another version of relfv are left out."""
        known = {field.name for field in fields(Settings)}
        lists = {name: tuple(values[name]) for name in ("alpha_sweep", "k_sweep") if name in values}
        return Settings(**{name: value for name, value in {**values, **lists}.items() if name in known})


_NOT_IN_FINGERPRINT = ("model", "device", "relation_csv_path", "trust_remote_code", "alpha_sweep", "k_sweep")
"""Where a model or CSV lies and which device ran it do not make another experiment; their contents are hashed. Sweeps
leave every other file as it is."""


def fingerprint_fields(settings: Settings, *, rows_sha256: str, model_identity: str) -> dict[str, Any]:
    """What two runs must share to continue each other, by name: settings, rows, model, algorithm version."""
    kept = {name: value for name, value in settings.to_json().items() if name not in _NOT_IN_FINGERPRINT}
    return {
        **kept,
        "rows_sha256": rows_sha256,
        "model_identity": model_identity,
        "algorithm_version": ALGORITHM_VERSION,
    }


def fingerprint(values: dict[str, Any]) -> str:
    """sha256 of the fields."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def require_within(flag: str, value: int, low: int, high: int) -> None:
    """Raise InputError that names ``flag`` if ``value`` is not a number from ``low`` to ``high``."""
    if not low <= value <= high:
        raise InputError(f"{flag} {value}: expected a whole number of at least {low} and at most {high}")


def parse_index_list(text: str, size: int, flag: str) -> list[int]:
    """``all``, or numbers and ranges such as ``0-3,7``, below ``size`` -> sorted indices.

    Raises InputError that names the part that is wrong.
    """
    if text.strip().lower() == "all":
        return list(range(size))
    chosen: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not (first.isdecimal() and (last.isdecimal() if dash else True)) or len(part) > 20:
            raise InputError(f"{flag} {text!r}: {part!r} is neither a number nor a range; expected e.g. all or 0-3,7")
        low, high = int(first), int(last) if dash else int(first)
        if low > high or high >= size:
            raise InputError(f"{flag} {text!r}: {part!r} is outside 0 to {size - 1}, or runs backwards")
        chosen.update(range(low, high + 1))
    return sorted(chosen)
