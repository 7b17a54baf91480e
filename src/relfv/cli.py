"""Command lines: parse, call, print the path of what was made. The scripts/ are the same functions.

Flags are those of TECH_SPEC_RELATION_QWISE; ``--device``, ``--dtype`` and ``--quant`` default to the environment's
DEVICE, DTYPE and QUANT, and may stand without a value, as they do in the spec's commands when those are unset.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from relfv import __version__
from relfv.errors import InputError, RelfvError
from relfv.settings import DEFAULT_OUT_ROOT, MAX_SEED, MOST, SCORE_KEYS, SPEC_CSV, Settings, require_within
from relfv.signals import Terminated, as_exceptions

log = logging.getLogger("relfv.cli")

_DEFAULTS = Settings()
Command = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """``relfv <command> ...``. Returns the exit code."""
    return _execute(build_parser(), argv)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(prog="relfv", description="Relation function vectors, one relation at a time.")
    parser.add_argument("--version", action="version", version=f"relfv {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, (help_text, add_flags, command) in _COMMANDS.items():
        sub = commands.add_parser(name, help=help_text, description=help_text)
        _add(sub, add_flags, command)
    return parser


def script_main(name: str, argv: Sequence[str] | None = None) -> int:
    """One command as a program of its own: what each file in scripts/ calls."""
    help_text, add_flags, command = _COMMANDS[name]
    parser = _Parser(description=help_text)
    _add(parser, add_flags, command)
    return _execute(parser, argv)


class _Parser(argparse.ArgumentParser):
    """Errors in one line, exit code 2, no usage dump; no abbreviated flags."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> Any:
        from relfv.logs import printable

        self.exit(2, printable(f"{self.prog}: error: {message} (see {self.prog} --help)") + "\n")


def _add(parser: argparse.ArgumentParser, add_flags: Callable[[Any], None], command: Command) -> None:
    add_flags(parser)
    parser.add_argument("--debug", action="store_true", help="more log lines, and a traceback after an error")
    parser.set_defaults(run_command=command)


def _execute(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    args = parser.parse_args(argv)
    from relfv.logs import set_up_logging
    from relfv.store.files import remedy

    set_up_logging(debug=args.debug)
    try:
        with as_exceptions():
            code = args.run_command(args)
            sys.stdout.flush()
            return code
    except RelfvError as problem:
        log.debug("traceback", exc_info=True)
        log.error("%s", problem)
        return problem.exit_code
    except KeyboardInterrupt:
        log.error("interrupted")
        return 130
    except Terminated:
        log.error("terminated")
        return 143
    except BrokenPipeError:  # whoever read our output, say head, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as problem:
        log.debug("traceback", exc_info=True)
        log.error("%s: %s; %s", problem.filename, problem.strerror, remedy(problem))
        return 1
    except Exception as problem:  # the last line of defence: one line for the user, all of it under --debug
        log.debug("traceback", exc_info=True)
        log.error("%s: %s (--debug shows where)", type(problem).__name__, problem)
        return 1


# --- flag groups -----------------------------------------------------------------------------------------------


def _setting(group: Any, flag: str, help_text: str, *, dest: str | None = None, **options: Any) -> None:
    """A flag for one field of Settings. Nothing is stored unless it is given: the field then keeps its default, or, for
    a command that works inside a q_id's folder, what that folder was made with."""
    name = dest or flag.removeprefix("--")
    default = getattr(_DEFAULTS, name)
    options = {"type": type(default), **options} if "action" not in options else options
    group.add_argument(flag, dest=name, default=argparse.SUPPRESS, help=f"{help_text} (default: {default})", **options)


def _model_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    _setting(group, "--model", "demo, a local folder, or a hub id")
    _setting(group, "--model_spec", "family: llama3, gpt2, neox, ...; auto = from the config")
    _setting(group, "--device", "auto, cpu, cuda, cuda:<n> or mps; else $DEVICE", nargs="?", const="")
    _setting(group, "--dtype", "auto (the checkpoint's), fp32, bf16 or fp16; else $DTYPE", nargs="?", const="")
    _setting(group, "--quant", "none, 8bit or 4bit (needs relfv[quant]); else $QUANT", nargs="?", const="")
    _setting(
        group,
        "--precision",
        "exact: float32 arithmetic; fast: the weights' dtype",
        choices=("exact", "fast"),
    )
    _setting(
        group, "--trust_remote_code", "run code that comes with the checkpoint", action=argparse.BooleanOptionalAction
    )


def _trial_flags(parser: argparse.ArgumentParser, n_trials_flag: str, n_demos_flag: str) -> None:
    group = parser.add_argument_group("trials")
    _setting(group, "--relation_csv_path", "columns id,ex_A,ex_B")
    _setting(group, n_trials_flag, "trials a q_id", dest="n_trials_per_q")
    _setting(group, n_demos_flag, "demos a prompt", dest="n_demos")
    _setting(group, "--seed", "seed of the trials")
    _setting(
        group,
        "--corruption",
        "derange: no demo keeps its label; shuffle: plain permutation",
        choices=("derange", "shuffle"),
    )


def _score_flag(group: Any) -> None:
    _setting(group, "--score_key", "what heads are ranked by", choices=SCORE_KEYS)


def _eval_flags(group: Any) -> None:
    _setting(group, "--alpha", "the vector is added alpha times")
    _setting(group, "--n_eval", "zero-shot prompts at most")
    _setting(
        group,
        "--allow_query_duplicates",
        "evaluate every trial's query, also those drawn more than once",
        action=argparse.BooleanOptionalAction,
    )


def _sweep_flags(group: Any) -> None:
    for flag, kind, help_text in (
        ("--alpha_sweep", float, "also add the vector so many times, e.g. 0.5,1,2 or =-1,1: step6/sweeps.json"),
        ("--k_sweep", int, "also add the vector of so many best heads, e.g. 1,5,10,20,40: step6/sweeps.json"),
    ):
        group.add_argument(flag, type=_numbers(kind), default=argparse.SUPPRESS, help=help_text)


def _numbers(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """A flag of numbers separated by commas, each kept once, ascending."""

    def parse(text: str) -> tuple[Any, ...]:
        try:
            return tuple(sorted({kind(part) for part in text.split(",")}))
        except ValueError:
            example = "1,5,10" if kind is int else "0.5,1,2"
            raise argparse.ArgumentTypeError(
                f"invalid value: {text[:40]!r}; expected numbers separated by commas, such as {example}"
            ) from None

    return parse


def _settings(args: argparse.Namespace, base: Settings = _DEFAULTS) -> Settings:
    """The flags that were given over ``base``. For device, dtype and quant the environment stands between the two."""
    from relfv.models.sources import dtype_name

    given = {name: value for name, value in vars(args).items() if name in base.to_json()}
    for name in ("device", "dtype", "quant"):
        given[name] = given.get(name) or os.environ.get(name.upper()) or getattr(base, name)
    settings = replace(base, **given)
    _check_names(settings)
    return replace(settings, dtype=dtype_name(settings.dtype))


def _check_names(settings: Settings) -> None:
    from relfv.models.families import SPEC_NAMES
    from relfv.models.sources import QUANTS

    if settings.quant not in QUANTS:
        raise InputError(f"--quant {settings.quant!r}: expected one of {', '.join(QUANTS)}")
    if settings.model_spec not in SPEC_NAMES:
        raise InputError(f"--model_spec {settings.model_spec!r}: expected one of {', '.join(SPEC_NAMES)}")


def _path(text: str) -> Path:
    """A path flag. An empty one would be the current folder, which an unset variable in a shell does not mean."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError("is empty or has a NUL in it; expected a path")
    return Path(text)


def _whole(low: int, high: int) -> Callable[[str], int]:
    """A flag that is a whole number within bounds and no field of Settings, which has its own."""

    def parse(text: str) -> int:
        try:
            require_within("", number := int(text), low, high)
        except (ValueError, InputError):
            raise argparse.ArgumentTypeError(
                f"invalid value: {text[:40]!r}; expected a whole number from {low} to {high}"
            ) from None
        return number

    return parse


# --- commands --------------------------------------------------------------------------------------------------


def _run_flags(parser: argparse.ArgumentParser) -> None:
    _model_flags(parser)
    _trial_flags(parser, "--n_trials_per_q", "--n_demos")
    group = parser.add_argument_group("run")
    group.add_argument("--q_list", default="all", help="q_ids, separated by commas, or all")
    group.add_argument(
        "--out_root", type=_path, default=DEFAULT_OUT_ROOT, help="results go to OUT_ROOT/<csv name>/<q_id>"
    )
    _score_flag(group)
    _setting(group, "--topk", "heads in the function vector")
    _eval_flags(group)
    _sweep_flags(group)
    group.add_argument(
        "--force", action="store_true", help="move earlier results of these q_ids aside and start afresh"
    )
    group.add_argument("--dry_run", action="store_true", help="say what would be done, and do nothing")


def _run(args: argparse.Namespace) -> int:
    from relfv.runs.run import RunRequest, run

    return run(RunRequest(_settings(args), _q_list(args.q_list), args.out_root, force=args.force, dry_run=args.dry_run))


def _q_list(text: str) -> tuple[str, ...] | None:
    q_ids = tuple(part.strip() for part in text.split(",") if part.strip())
    if not q_ids:
        raise InputError("--q_list: is empty; expected q_ids separated by commas, or all")
    return None if q_ids == ("all",) else q_ids


def _cross_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", type=_path, nargs="?", default=DEFAULT_OUT_ROOT / SPEC_CSV.stem, help="a relation's results"
    )
    parser.add_argument("--q_list", default="all", help="q_ids, separated by commas, or all that are completed")
    _model_flags(parser)


def _cross(args: argparse.Namespace) -> int:
    from relfv.runs.cross import cross

    return cross(args.folder, _q_list(args.q_list), lambda base: _settings(args, base))


def _step_d_flags(parser: argparse.ArgumentParser) -> None:
    _model_flags(parser)
    _trial_flags(parser, "--relation_n_trials_per_q", "--relation_n_demos")
    group = parser.add_argument_group("sweep")
    group.add_argument("--relation_q_list", required=True, help="the q_id to run (one)")
    _setting(group, "--layers", "all, or e.g. 0-3,7")
    _setting(group, "--heads", "all, or e.g. 0-3,7")
    _score_flag(group)
    group.add_argument("--out_base_dir", type=_path, required=True, help="folder of the q_id; artifacts/ is made in it")


def _step_d(args: argparse.Namespace) -> int:
    from relfv.runs.single import run_step_d

    q_ids = _q_list(args.relation_q_list)
    if q_ids is None or len(q_ids) != 1:
        raise InputError(
            f"--relation_q_list {args.relation_q_list!r}: expected one q_id a run; relfv run does them all"
        )
    return run_step_d(_settings(args), q_ids[0], args.out_base_dir)


def _heatmap_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--in_dir", type=_path, required=True, help="the q_id's artifacts folder")
    parser.add_argument("--metric", choices=SCORE_KEYS, default=_DEFAULTS.score_key, help="column to draw")
    parser.add_argument("--topk", type=_whole(1, MOST), default=_DEFAULTS.topk, help="heads to mark")
    parser.add_argument("--out_name", default=None, help="file name within --in_dir (default: aie_heatmap_<Q>.png)")


def _heatmap(args: argparse.Namespace) -> int:
    from relfv.runs.single import run_heatmap

    return run_heatmap(args.in_dir, args.metric, args.topk, args.out_name)


def _step_e_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stepd_artifacts_dir", type=_path, required=True, help="StepD's artifacts folder")
    parser.add_argument("--sampled_trials_path", type=_path, required=True, help="StepD's sampled_trials.json")
    _setting(parser, "--k", "heads in the function vector", dest="topk")
    _score_flag(parser)
    _setting(parser, "--alpha", "the vector is added alpha times")
    parser.add_argument("--out_dir", type=_path, required=True, help="where the vector goes")
    _model_flags(parser)


def _step_e(args: argparse.Namespace) -> int:
    from relfv.runs.single import run_step_e

    return run_step_e(
        args.stepd_artifacts_dir, args.sampled_trials_path, args.out_dir, lambda base: _settings(args, base)
    )


def _zero_shot_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sampled_trials_path", type=_path, required=True, help="StepD's sampled_trials.json")
    parser.add_argument("--out_path", type=_path, default=None, help="default: sampled_trials_zeroshot.json beside it")


def _zero_shot(args: argparse.Namespace) -> int:
    from relfv.runs.single import run_zero_shot

    return run_zero_shot(args.sampled_trials_path, args.out_path)


def _step6_flags(parser: argparse.ArgumentParser) -> None:
    _model_flags(parser)
    parser.add_argument("--fv_global_path", type=_path, required=True, help="StepE's fv_global_resid.pt")
    parser.add_argument("--sampled_trials_path", type=_path, required=True, help="sampled_trials_zeroshot.json")
    parser.add_argument("--edit_layer", type=int, required=True, help="the layer to inject at (one; loop outside)")
    _eval_flags(parser)
    parser.add_argument("--out_dir", type=_path, required=True, help="where this layer's results go")


def _step6(args: argparse.Namespace) -> int:
    from relfv.runs.single import run_step6

    return run_step6(
        args.fv_global_path,
        args.sampled_trials_path,
        args.edit_layer,
        args.out_dir,
        lambda base: _settings(args, base),
    )


def _status_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out_root", type=_path, nargs="?", default=DEFAULT_OUT_ROOT, help="results folder")


def _status(args: argparse.Namespace) -> int:
    from relfv.report.table import status_table

    print(status_table(args.out_root))
    return 0


def _verify_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", type=Path, nargs="?", default=DEFAULT_OUT_ROOT, help="of a q_id, of a relation, or all results"
    )
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")


def _verify(args: argparse.Namespace) -> int:
    from relfv.runs.verify import verify

    found = verify(args.folder)
    print(found.to_json() if args.json else found.to_text())
    return 0 if found.holds else 1


def _report_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=_path, help="a relation's results, e.g. results_fv/relation_qwise/relationA_ex")


def _report(args: argparse.Namespace) -> int:
    from relfv.report.page import write_report

    print(write_report(args.folder))
    return 0


def _demo_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("train",), help="train: make the demo model again from its CSV")
    parser.add_argument("--out_dir", type=_path, required=True, help="where the model goes")
    parser.add_argument("--relation_csv_path", type=_path, default=SPEC_CSV, help="relations it learns")
    parser.add_argument("--seed", type=_whole(0, MAX_SEED), default=0, help="seed of weights and documents")
    parser.add_argument("--steps", type=_whole(1, MOST), default=None, help="training steps (default: the recipe's)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--log_path", type=_path, default=None, help="JSON lines of the training log go here")


def _demo(args: argparse.Namespace) -> int:
    from relfv.demo.training import train_demo_model

    train_demo_model(
        args.out_dir,
        csv_path=args.relation_csv_path,
        seed=args.seed,
        steps=args.steps,
        device=args.device,
        log_path=args.log_path,
        log=log.info,
    )
    print(args.out_dir)
    return 0


_COMMANDS: dict[str, tuple[str, Callable[[Any], None], Command]] = {
    "run": ("Run every stage of every q_id; a restart carries on.", _run_flags, _run),
    "cross": (
        "Inject every completed q_id's function vector into every other's prompts (model flags default to the q_ids' own).",
        _cross_flags,
        _cross,
    ),
    "status": ("Say where every q_id stands.", _status_flags, _status),
    "verify": ("Check that results are complete, undamaged and agree; no model is opened.", _verify_flags, _verify),
    "report": ("Make the page of a results folder again.", _report_flags, _report),
    "stepd": ("StepD of one q_id: trials, mean activations, effect of every head.", _step_d_flags, _step_d),
    "heatmap": ("Heatmap of layers x heads from StepD's scores.", _heatmap_flags, _heatmap),
    "stepe": ("StepE: top heads and function vector, and the zero-shot snapshot.", _step_e_flags, _step_e),
    "zeroshot": ("The zero-shot snapshot of frozen trials.", _zero_shot_flags, _zero_shot),
    "step6": ("Step6: inject the function vector at one layer.", _step6_flags, _step6),
    "demo-model": ("Train the embedded demo model.", _demo_flags, _demo),
}
