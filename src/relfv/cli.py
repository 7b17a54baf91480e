"""Command lines: parse, call, print the path of what was made. The scripts/ are the same functions.

Flags are those of TECH_SPEC_RELATION_QWISE, made from the fields of ``Settings``; some default to an environment
variable, and may stand without a value, as they do in the spec's commands when that is unset.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from typing import Any

from relfv import __version__
from relfv.errors import InputError, RelfvError
from relfv.flags import DEFAULTS, Parser, add_setting, path_flag, q_ids_from, settings_from, whole_number
from relfv.logs import drop_output, set_up_logging, show
from relfv.settings import DEFAULT_OUT_ROOT, FLAGS, MAX_SEED, MOST, SCORE_KEYS, SPEC_CSV
from relfv.signals import Terminated, as_exceptions
from relfv.store.files import remedy

log = logging.getLogger("relfv.cli")

Command = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """``relfv <command> ...``. Returns the exit code."""
    return _execute(build_parser(), argv)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = Parser(prog="relfv", description="Relation function vectors, one relation at a time.")
    parser.add_argument("--version", action="version", version=f"relfv {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, (help_text, _, _) in _COMMANDS.items():
        _add(commands.add_parser(name, help=help_text, description=help_text), name)
    return parser


def script_main(name: str, argv: Sequence[str] | None = None) -> int:
    """One command as a program of its own: what each file in scripts/ calls."""
    parser = Parser(description=_COMMANDS[name][0])
    _add(parser, name)
    return _execute(parser, argv)


def _add(parser: argparse.ArgumentParser, name: str) -> None:
    _, add_flags, command = _COMMANDS[name]
    add_flags(parser)
    groups: dict[str, Any] = {}
    for field, flag in FLAGS.items():
        if name in flag.commands:
            if flag.group not in groups:
                groups[flag.group] = parser.add_argument_group(flag.group)
            add_setting(groups[flag.group], field, flag, flag.names.get(name, f"--{field}"))
    parser.add_argument("--debug", action="store_true", help="more log lines, and a traceback after an error")
    parser.set_defaults(run_command=command, command_name=name)


def _execute(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    set_up_logging(debug=False)
    try:
        with as_exceptions():  # from the first moment: an interrupt while flags are read is an interrupt, too
            args = parser.parse_args(argv)
            set_up_logging(debug=args.debug)
            return args.run_command(args)
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
        drop_output()
        return 141
    except OSError as problem:
        log.debug("traceback", exc_info=True)
        where = f"{problem.filename}: " if problem.filename else ""
        log.error("%s%s; %s", where, problem.strerror or problem, remedy(problem))
        return 1
    except Exception as problem:  # the last line of defence: one line for the user, all of it under --debug
        log.debug("traceback", exc_info=True)
        log.error("%s: %s (--debug shows where)", type(problem).__name__, problem)
        return 1


# --- commands: what each has beside settings, and what it calls ----------------------------------------------------


def _run_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--q_list", default="all", help="q_ids, separated by commas, or all")
    group.add_argument(
        "--out_root", type=path_flag, default=DEFAULT_OUT_ROOT, help="results go to OUT_ROOT/<csv name>/<q_id>"
    )
    group.add_argument(
        "--force", action="store_true", help="move earlier results of these q_ids aside and start afresh"
    )
    group.add_argument("--dry_run", action="store_true", help="say what would be done, and do nothing")


def _run(args: argparse.Namespace) -> int:
    from relfv.runs.plan import RunRequest
    from relfv.runs.run import run

    return run(
        RunRequest(settings_from(args), q_ids_from(args.q_list), args.out_root, force=args.force, dry_run=args.dry_run)
    )


def _cross_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", type=path_flag, nargs="?", default=DEFAULT_OUT_ROOT / SPEC_CSV.stem, help="a relation's results"
    )
    parser.add_argument("--q_list", default="all", help="q_ids, separated by commas, or all that are completed")


def _cross(args: argparse.Namespace) -> int:
    from relfv.runs.cross import cross

    return cross(args.folder, q_ids_from(args.q_list), lambda base: settings_from(args, base))


def _step_d_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--relation_q_list", required=True, help="the q_id to run (one)")
    parser.add_argument(
        "--out_base_dir", type=path_flag, required=True, help="folder of the q_id; artifacts/ is made in it"
    )


def _step_d(args: argparse.Namespace) -> int:
    from relfv.runs.single import run_step_d

    q_ids = q_ids_from(args.relation_q_list)
    if q_ids is None or len(q_ids) != 1:
        raise InputError(
            f"--relation_q_list {args.relation_q_list!r}: expected one q_id a run; relfv run does them all"
        )
    return run_step_d(settings_from(args), q_ids[0], args.out_base_dir)


def _heatmap_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--in_dir", type=path_flag, required=True, help="the q_id's artifacts folder")
    parser.add_argument("--metric", choices=SCORE_KEYS, default=DEFAULTS.score_key, help="column to draw")
    parser.add_argument("--topk", type=whole_number(1, MOST), default=DEFAULTS.topk, help="heads to mark")
    parser.add_argument("--out_name", default=None, help="file name within --in_dir (default: aie_heatmap_<Q>.png)")


def _heatmap(args: argparse.Namespace) -> int:
    from relfv.runs.single import run_heatmap

    return run_heatmap(args.in_dir, args.metric, args.topk, args.out_name)


def _step_e_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stepd_artifacts_dir", type=path_flag, required=True, help="StepD's artifacts folder")
    parser.add_argument("--sampled_trials_path", type=path_flag, required=True, help="StepD's sampled_trials.json")
    parser.add_argument("--out_dir", type=path_flag, required=True, help="where the vector goes")


def _step_e(args: argparse.Namespace) -> int:
    from relfv.runs.single import run_step_e

    paths = args.stepd_artifacts_dir, args.sampled_trials_path, args.out_dir
    return run_step_e(*paths, lambda base: settings_from(args, base))


def _zero_shot_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sampled_trials_path", type=path_flag, required=True, help="StepD's sampled_trials.json")
    parser.add_argument(
        "--out_path", type=path_flag, default=None, help="default: sampled_trials_zeroshot.json beside it"
    )


def _zero_shot(args: argparse.Namespace) -> int:
    from relfv.runs.single import run_zero_shot

    return run_zero_shot(args.sampled_trials_path, args.out_path)


def _step6_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--fv_global_path", type=path_flag, required=True, help="StepE's fv_global_resid.pt")
    parser.add_argument("--sampled_trials_path", type=path_flag, required=True, help="sampled_trials_zeroshot.json")
    parser.add_argument("--edit_layer", type=int, required=True, help="the layer to inject at (one; loop outside)")
    parser.add_argument("--out_dir", type=path_flag, required=True, help="where this layer's results go")


def _step6(args: argparse.Namespace) -> int:
    from relfv.runs.single import run_step6

    paths = args.fv_global_path, args.sampled_trials_path, args.edit_layer, args.out_dir
    return run_step6(*paths, lambda base: settings_from(args, base))


def _status_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out_root", type=path_flag, nargs="?", default=DEFAULT_OUT_ROOT, help="results folder")
    parser.add_argument("--json", action="store_true", help="print all that is known of every q_id as JSON")


def _status(args: argparse.Namespace) -> int:
    from relfv.report.table import status_json, status_table

    show(status_json(args.out_root) if args.json else status_table(args.out_root))
    return 0


def _verify_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", type=path_flag, nargs="?", default=DEFAULT_OUT_ROOT, help="of a q_id, of a relation, or all results"
    )
    parser.add_argument("--json", action="store_true", help="print the verdicts as JSON")


def _verify(args: argparse.Namespace) -> int:
    from relfv.runs.verify import verify

    verification = verify(args.folder)
    show(verification.to_json() if args.json else verification.to_text())
    return 0 if verification.holds else 1


def _report_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", type=path_flag, help=f"a relation's results, e.g. {DEFAULT_OUT_ROOT / SPEC_CSV.stem}, or all results"
    )


def _report(args: argparse.Namespace) -> int:
    from relfv.report.page import write_pages

    show(write_pages(args.folder))
    return 0


def _export_flags(parser: argparse.ArgumentParser) -> None:
    _report_flags(parser)
    parser.add_argument("--parquet", action="store_true", help="also as tables/*.parquet (needs relfv[parquet])")


def _export(args: argparse.Namespace) -> int:
    from relfv.report.written_tables import export

    show(export(args.folder, parquet=args.parquet))
    return 0


def _demo_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("train",), help="train: make the demo model again from its CSV")
    parser.add_argument("--out_dir", type=path_flag, required=True, help="where the model goes")
    parser.add_argument("--relation_csv_path", type=path_flag, default=SPEC_CSV, help="relations it learns")
    parser.add_argument("--seed", type=whole_number(0, MAX_SEED), default=0, help="seed of weights and documents")
    parser.add_argument(
        "--steps", type=whole_number(1, MOST), default=None, help="training steps (default: the recipe's)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--log_path", type=path_flag, default=None, help="JSON lines of the training log go here")


def _demo(args: argparse.Namespace) -> int:
    from relfv.demo.training import train_demo_model

    options = {name: getattr(args, name) for name in ("seed", "steps", "device", "log_path")}
    train_demo_model(args.out_dir, csv_path=args.relation_csv_path, log=log.info, **options)
    show(args.out_dir)
    return 0


_COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], Command]] = {
    "run": ("Run every stage of every q_id; a restart carries on.", _run_flags, _run),
    "cross": (
        "Inject every completed q_id's function vector into every other's prompts (model flags default to the q_ids' "
        "own).",
        _cross_flags,
        _cross,
    ),
    "status": ("Say where every q_id stands.", _status_flags, _status),
    "verify": ("Check that results are complete, undamaged and agree; no model is opened.", _verify_flags, _verify),
    "report": ("Make the page of every relation of a results folder again.", _report_flags, _report),
    "export": ("Write the tables of every relation of a results folder again.", _export_flags, _export),
    "stepd": ("StepD of one q_id: trials, mean activations, effect of every head.", _step_d_flags, _step_d),
    "heatmap": ("Heatmap of layers x heads from StepD's scores.", _heatmap_flags, _heatmap),
    "stepe": ("StepE: top heads and function vector, and the zero-shot snapshot.", _step_e_flags, _step_e),
    "zeroshot": ("The zero-shot snapshot of frozen trials.", _zero_shot_flags, _zero_shot),
    "step6": ("Step6: inject the function vector at one layer.", _step6_flags, _step6),
    "demo-model": ("Train the embedded demo model.", _demo_flags, _demo),
}
