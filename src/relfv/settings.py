"""The settings of a run, and the spec's fixed values.

A setting is one field of ``Settings``: its default, its help text, its bounds, and the commands that have it as a flag.
The command line, the fingerprint, the list of departures from the spec and the bounds all follow from the fields.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from relfv.errors import InputError
from relfv.types import MEASURES

SPEC_CSV = Path("datasets/relation/relationA_ex.csv")
FIGURE_FORMATS = ("png", "svg", "pdf")
SCORE_KEYS = tuple(f"mean_{kind}delta_{m}" for kind in ("", "abs_") for m in MEASURES)
"""What heads may be ranked by."""
MOST = 100_000
"""Of trials, demos, heads, prompts: a larger number is a typing error, and would fill the memory before it is
noticed."""
MOST_PER_CARD = 64
"""Processes on a device: a larger number is a typing error, and would fill the memory of the host."""
MAX_SEED = 2**63 - 1
"""What other readers of the JSON files can hold."""
STUDIES = ("ablation", "mlp", "positions", "new_queries", "attribution")
"""What ``--extras`` may name beside all and none: stages that a q_id is complete without."""
_MAX_ALPHA = 1e6
"""Beyond it models compute nothing but overflow."""
DEFAULT_OUT_ROOT = Path("results_fv/relation_qwise")


@dataclass(frozen=True)
class Flag:
    """How a setting is given on the command line."""

    help: str
    group: str
    """The heading it stands under in ``--help``."""
    commands: tuple[str, ...]
    """The commands that have it."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Command -> the flag's name there, where it is not ``--<field>``."""
    choices: tuple[str, ...] | None = None
    low: float = -math.inf
    high: float = math.inf
    environment: str | None = None
    """The environment variable that is used where the flag is not given."""
    blank: bool = False
    """Whether the flag may stand without a value and then counts as not given: the spec's commands leave its variable
    unset."""
    identity: bool = True
    """False for what does not make another experiment: where things lie, and what leaves other files as they are."""
    fixed: bool = False
    """True for what the spec fixes (section 2)."""


_MODEL = ("model", ("run", "cross", "aggregate", "stepd", "stepe", "step6"))
_TRIALS = ("trials", ("run", "stepd"))


def _setting(default: Any, help_text: str, place: tuple[str, tuple[str, ...]], **options: Any) -> Any:
    return field(default=default, metadata={"flag": Flag(help_text, *place, **options)})


@dataclass(frozen=True)
class Settings:
    """What a run was asked for; the defaults are the spec's section 2. Fields with ``identity`` make the experiment:
    they and a q_id's rows decide its numbers. The others say where and how it runs."""

    model: str = _setting(
        "meta-llama/Llama-3.1-8B", "demo, a local folder, or a hub id", _MODEL, environment="MODEL", identity=False,
        fixed=True,
    )  # fmt: skip
    model_spec: str = _setting(
        "llama3",
        "family: llama3, gpt2, neox, ...; auto = from the config, also where only --model is given",
        _MODEL,
        environment="MODEL_SPEC",
        fixed=True,
    )
    revision: str = _setting(
        "", "branch, tag or commit of a model on the hub, such as a training checkpoint; its commit is part of the "
        "model's identity", _MODEL, identity=False,
    )  # fmt: skip
    device: str = _setting(
        "auto",
        "auto, cpu, cuda, cuda:<n> or mps; cuda:0+cuda:1: one model over both",
        _MODEL,
        environment="DEVICE",
        blank=True,
        identity=False,
    )
    dtype: str = _setting(
        "auto", "auto (the checkpoint's), fp32, bf16 or fp16", _MODEL, environment="DTYPE", blank=True
    )
    quant: str = _setting("none", "none, 8bit or 4bit (needs relfv[quant])", _MODEL, environment="QUANT", blank=True)
    offload: str = _setting(
        "auto", "where weights are that do not fit on the card: auto, none (all on it), cpu (blocks stream from host "
        "memory) or disk (from their files); the same numbers", _MODEL, choices=("auto", "none", "cpu", "disk"),
        identity=False,
    )  # fmt: skip
    precision: str = _setting(
        "exact", "exact: float32 arithmetic; fast: the weights' dtype", _MODEL, choices=("exact", "fast")
    )
    seed: int = _setting(0, "seed of the trials", _TRIALS, environment="SEED", low=0, high=MAX_SEED, fixed=True)
    relation_csv_path: str = _setting(
        str(SPEC_CSV), "columns id,ex_A,ex_B", _TRIALS, environment="RELATION_CSV", identity=False
    )
    n_trials_per_q: int = _setting(
        25, "trials a q_id", _TRIALS, names={"stepd": "--relation_n_trials_per_q"}, environment="N_TRIALS_PER_Q",
        low=1, high=MOST, fixed=True,
    )  # fmt: skip
    n_demos: int = _setting(
        9, "demos a prompt", _TRIALS, names={"stepd": "--relation_n_demos"}, environment="N_DEMOS", low=1, high=MOST,
        fixed=True,
    )  # fmt: skip
    corruption: str = _setting(
        "derange", "labels of corrupted demos: derange (none keeps its own), shuffle (plain permutation), random "
        "(drawn from the relation's answers) or other (from the CSV's other relations)", _TRIALS,
        choices=("derange", "shuffle", "random", "other"), fixed=True,
    )  # fmt: skip
    target: str = _setting(
        "first", "the answer's token that is scored: first, or distinguishing (the first that tells it from the "
        "relation's other answers, after feeding what they share)", _TRIALS, choices=("first", "distinguishing"),
        fixed=True,
    )  # fmt: skip
    layers: str = _setting("all", "layers swept: all, or e.g. 0-3,7", ("sweep", ("stepd",)), fixed=True)
    heads: str = _setting("all", "heads swept in each layer: all, or e.g. 0-3,7", ("sweep", ("stepd",)), fixed=True)
    score_key: str = _setting(
        "mean_delta_p", "what heads are ranked by", ("heads", ("run", "stepd", "stepe")), choices=SCORE_KEYS,
        environment="SCORE_KEY", fixed=True,
    )  # fmt: skip
    topk: int = _setting(
        20, "heads in the function vector", ("heads", ("run", "stepe")), names={"stepe": "--k"}, environment="TOPK",
        low=1, high=MOST, fixed=True,
    )  # fmt: skip
    alpha: float = _setting(
        1.0, "the vector is added alpha times", ("injection", ("run", "stepe", "step6")), environment="ALPHA",
        low=-_MAX_ALPHA, high=_MAX_ALPHA, fixed=True,
    )  # fmt: skip
    n_eval: int = _setting(
        50, "zero-shot prompts at most", ("injection", ("run", "step6")), environment="N_EVAL", low=1, high=MOST,
        fixed=True,
    )  # fmt: skip
    allow_query_duplicates: bool = _setting(
        False, "evaluate every trial's query, also those drawn more than once", ("injection", ("run", "step6")),
        fixed=True,
    )  # fmt: skip
    trust_remote_code: bool = _setting(False, "run code that comes with the checkpoint", _MODEL, identity=False)
    self_check: str = _setting(
        "auto", "of the engine, when the model is opened: auto (what one found on the same files, code and hardware "
        "stands) or always", _MODEL, choices=("auto", "always"), identity=False,
    )  # fmt: skip
    alpha_sweep: tuple[float, ...] = _setting(
        (), "also add the vector with these factors, e.g. 0.5,1,2; below 0: --alpha_sweep=-1,1 (step6/sweeps.json)",
        ("injection", ("run",)), low=-_MAX_ALPHA, high=_MAX_ALPHA, identity=False,
    )  # fmt: skip
    alpha_sweep_relative: tuple[float, ...] = _setting(
        (), "also add the vector at these shares of the hidden state's mean length, e.g. 0.1,0.5,1: step6/sweeps.json",
        ("injection", ("run",)), low=-_MAX_ALPHA, high=_MAX_ALPHA, identity=False,
    )  # fmt: skip
    k_sweep: tuple[int, ...] = _setting(
        (), "also add the vectors of these numbers of heads, e.g. 1,5,10,20,40: step6/sweeps.json",
        ("injection", ("run",)), low=1, high=MOST, identity=False,
    )  # fmt: skip
    replicates: int = _setting(
        0, "so many independent draws of trials, this run's and 1 or more others: how alike are their heads and "
        "vectors, with 5, 10, 25, 50 trials? (replicates/replicates.json)", ("trials", ("run",)), low=0, high=1000,
        identity=False,
    )  # fmt: skip
    formats: str = _setting(
        "", "other prompt formats, separated by commas: arrow (x -> y), colon (x: y), instruction (no demos), or a "
        "JSON file of your own: whose vector works where? (formats/formats.json)", ("trials", ("run",)), identity=False,
    )  # fmt: skip
    extras: str = _setting(
        "all", "what relfv adds to the spec's stages (controls, whole answers, verdict): all, or none, or studies that "
        f"cost more and come on top of all: {', '.join(STUDIES)}, separated by commas; a later run adds what it asks "
        "for", ("extras", ("run",)), identity=False,
    )  # fmt: skip

    figure_formats: str = _setting(
        "png", "png, svg and pdf, separated by commas: in what each q_id's two figures are drawn (png always is)",
        ("figures", ("run",)), identity=False,
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name, flag in FLAGS.items():
            value = getattr(self, name)
            for one in value if isinstance(value, tuple) else (value,):
                _require_allowed(f"--{name}", one, flag)
        if self.replicates == 1:
            raise InputError("--replicates 1: one draw has none to be compared with; expected 2 or more, or 0 for none")
        if self.extras not in ("all", "none") and not {*self.extras.split(",")} <= {"all", *STUDIES}:
            raise InputError(
                f"--extras {self.extras!r}: expected all, none, or some of {', '.join(STUDIES)}, separated by commas"
            )
        if not set(self.more_formats) <= set(FIGURE_FORMATS):
            some = ", ".join(FIGURE_FORMATS)
            raise InputError(f"--figure_formats {self.figure_formats!r}: expected some of {some}, separated by commas")

    @property
    def more_formats(self) -> list[str]:
        """What figures are drawn in beside PNG."""
        return [kind for kind in self.figure_formats.split(",") if kind != "png"]

    @property
    def has_extras(self) -> bool:
        """Whether the stages beyond the spec's are asked for."""
        return self.extras != "none"

    @property
    def studies(self) -> frozenset[str]:
        """Those of STUDIES that are asked for."""
        return frozenset(self.extras.split(",")) & frozenset(STUDIES)

    @property
    def sweeps(self) -> tuple[tuple[float, ...], ...]:
        """The other alphas and k that are asked for; empty where none is."""
        values = tuple(getattr(self, name) for name in SWEEPS)
        return values if any(values) else ()

    def departures(self) -> list[str]:
        """In what these settings depart from what the spec fixes (section 2), in words."""
        departures = [
            f"{name} is {getattr(self, name)}, the spec fixes {DEFAULTS[name]}"
            for name, flag in FLAGS.items()
            if flag.fixed and getattr(self, name) != DEFAULTS[name]
        ]
        # The same file by another path, say from another working folder, is no departure.
        if Path(self.relation_csv_path).parts[-len(SPEC_CSV.parts) :] != SPEC_CSV.parts:
            departures.append(f"relation_csv_path is {self.relation_csv_path}, the spec fixes {SPEC_CSV}")
        return departures

    def to_json(self) -> dict[str, Any]:
        """As a plain dict, in the order above."""
        return {name: getattr(self, name) for name in FLAGS}

    @staticmethod
    def from_json(values: dict[str, Any]) -> Settings:
        """The inverse of ``to_json``; keys of another version of relfv are left out, missing ones take their
        defaults."""
        known: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items() if name in FLAGS
        }
        return Settings(**known)


FLAGS: dict[str, Flag] = {one.name: one.metadata["flag"] for one in fields(Settings)}
"""The flag of each setting, in the order of the fields."""
DEFAULTS: dict[str, Any] = {one.name: one.default for one in fields(Settings)}
"""The value of each setting where it is not given."""

SWEEPS = ("alpha_sweep", "alpha_sweep_relative", "k_sweep")
"""The settings that ask for sweeps."""
IDENTITY = tuple(name for name, flag in FLAGS.items() if flag.identity)
"""The settings that make an experiment."""
MODEL_SETTINGS = tuple(name for name in IDENTITY if FLAGS[name].group == "model")
"""Those of them that every number of the model depends on."""


def _require_allowed(flag_name: str, value: Any, flag: Flag) -> None:
    if flag.choices and value not in flag.choices:
        raise InputError(f"{flag_name} {value!r}: expected one of {', '.join(flag.choices)}")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if isinstance(value, float):
        if not flag.low <= value <= flag.high:  # so written that NaN fails too
            raise InputError(f"{flag_name} {value}: expected a finite number between {flag.low:g} and {flag.high:g}")
    elif math.isfinite(flag.high):
        require_within(flag_name, value, int(flag.low), int(flag.high))


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
