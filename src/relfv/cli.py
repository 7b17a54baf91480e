"""Command lines: parse, call, print the path of what was made. The scripts/ are the same functions.

Flags are those of TECH_SPEC_RELATION_QWISE, made from the fields of ``Settings``; some default to an environment
variable, and may stand without a value, as they do in the spec's commands when that is unset.
"""

from __future__ import annotations

import argparse
import logging
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from relfv import __version__
from relfv.commands import runs, stages
from relfv.commands.examples import EXAMPLES
from relfv.commands.figure import FIGURE_HELP, figure, figure_flags
from relfv.commands.flags import add_setting, path_flag, whole_number
from relfv.commands.parsing import Parser
from relfv.errors import RelfvError
from relfv.logs import drop_output, set_up_logging, show
from relfv.settings import DEFAULT_OUT_ROOT, FLAGS, MAX_SEED, MOST, SPEC_CSV
from relfv.signals import Terminated, TimeIsUp, as_exceptions
from relfv.store.files import remedy

log = logging.getLogger("relfv.cli")

Command = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """``relfv <command> ...``. Returns the exit code."""
    return _execute(build_parser(), argv)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    about = "Relation function vectors, one relation at a time."
    parser = Parser(prog="relfv", description=about, epilog=_shown(EXAMPLES["relfv"]))
    parser.add_argument("--version", action="version", version=f"relfv {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, (help_text, _, _) in _COMMANDS.items():
        _add(commands.add_parser(name, help=help_text), name)
    return parser


def script_main(name: str, argv: Sequence[str] | None = None) -> int:
    """One command as a program of its own: what each file in scripts/ calls."""
    parser = Parser()
    _add(parser, name)
    return _execute(parser, argv)


def _add(parser: argparse.ArgumentParser, name: str) -> None:
    about, add_flags, command = _COMMANDS[name]
    parser.description, parser.epilog = textwrap.fill(about, 79), _shown(EXAMPLES.get(name, ()))
    add_flags(parser)
    groups: dict[str, Any] = {}
    like = "run" if name == "doctor" else name
    for field, flag in FLAGS.items():
        if like in flag.commands:
            if flag.group not in groups:
                groups[flag.group] = parser.add_argument_group(flag.group)
            add_setting(groups[flag.group], field, flag, flag.names.get(like, f"--{field}"))
    parser.add_argument("--debug", action="store_true", help="more log lines, and a traceback after an error")
    parser.set_defaults(run_command=command, command_name=like)


def _shown(examples: Sequence[str]) -> str | None:
    return "\n  ".join(["examples:", *examples]) if examples else None


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
    except TimeIsUp:
        log.error("told by SIGUSR1 that its time is up; the same command goes on from here")
        return 138
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


def _add_place(parser: argparse.ArgumentParser, what: str) -> None:
    """A folder of results, by its place among the arguments or by the flag that ``run`` has for it."""
    place = parser.add_mutually_exclusive_group()
    place.add_argument("folder", type=path_flag, nargs="?", help=f"{what} (default: {DEFAULT_OUT_ROOT})")
    place.add_argument("--out_root", type=path_flag, help="the same")


def _place(args: argparse.Namespace) -> Path:
    return args.folder or args.out_root or DEFAULT_OUT_ROOT


def _status_flags(parser: argparse.ArgumentParser) -> None:
    _add_place(parser, "results folder")
    parser.add_argument("--json", action="store_true", help="print all that is known of every q_id as JSON")
    parser.add_argument("--watch", action="store_true", help="again every 5 s, until no run is at work there")


def _status(args: argparse.Namespace) -> int:
    from relfv.report.table import status_json, status_table
    from relfv.report.watch import watch

    if args.watch and not args.json:
        watch(_place(args), every_s=5.0)
        return 0
    show(status_json(_place(args)) if args.json else status_table(_place(args)))
    return 0


def _verify_flags(parser: argparse.ArgumentParser) -> None:
    _add_place(parser, "of a q_id, of a relation, or all results")
    parser.add_argument("--json", action="store_true", help="print the verdicts as JSON")


def _verify(args: argparse.Namespace) -> int:
    from relfv.runs.verify import verify

    verification = verify(_place(args))
    show(verification.to_json() if args.json else verification.to_text())
    return 0 if verification.holds else 1


def _report_flags(parser: argparse.ArgumentParser) -> None:
    _add_place(parser, "of a relation, or all results")


def _report(args: argparse.Namespace) -> int:
    from relfv.report.page import relations_of, write_pages
    from relfv.report.written_tables import write_tables
    from relfv.runs.manifest import gather_shards
    from relfv.runs.naming import take_names_below

    folder = _place(args)
    for relation in relations_of(folder):
        if gather_shards(relation):
            write_tables(relation)
    take_names_below(folder)
    show(write_pages(folder))
    return 0


def _export_flags(parser: argparse.ArgumentParser) -> None:
    _add_place(parser, "of a relation, or all results")
    parser.add_argument("--parquet", action="store_true", help="also as tables/*.parquet (needs relfv[parquet])")


def _export(args: argparse.Namespace) -> int:
    from relfv.report.written_tables import export

    show(export(_place(args), parquet=args.parquet))
    return 0


def _import_flags(parser: argparse.ArgumentParser) -> None:
    from relfv.importing.formats import IMPORT_FORMATS

    about = "; ".join(f"{name}: {form.about}" for name, form in IMPORT_FORMATS.items())
    parser.add_argument("sources", type=path_flag, nargs="+", help="files, or folders of them")
    parser.add_argument("--out", type=path_flag, required=True, help="the relation CSV to write")
    parser.add_argument("--format", choices=("auto", *IMPORT_FORMATS), default="auto", help=about)
    parser.add_argument(
        "--alternatives", default=None, help="what stands between several right answers in one field, such as /"
    )


def _import(args: argparse.Namespace) -> int:
    from relfv.importing.convert import convert

    for path in convert(args.sources, args.out, form=args.format, alternatives=args.alternatives):
        show(path)
    return 0


def _completion_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="the shell to complete in")


def _completion(args: argparse.Namespace) -> int:
    from relfv.commands.completion import completion

    show(completion(build_parser(), args.shell))
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
    "run": ("Run every stage of every q_id; a restart carries on.", runs.run_flags, runs.run),
    "doctor": (
        "Look before a run: is everything there, what do the relations and the tokenizer forbid to conclude, how long "
        "will it take; exit code 1 if the run would be refused.",
        runs.doctor_flags,
        runs.doctor,
    ),
    "compare": (
        "Compare two models, or two settings, on the same relations: paired differences, heads they share, vectors.",
        runs.compare_flags,
        runs.compare,
    ),
    "cross": (
        "Inject every completed q_id's function vector into every other's prompts (model flags default to the q_ids' "
        "own).",
        runs.cross_flags,
        runs.cross,
    ),
    "aggregate": (
        "Put all completed relations together: which the model can do, heads that lead over all of them, what heads "
        "carry of a relation that had no part in their choice, which relations are alike.",
        runs.aggregate_flags,
        runs.aggregate,
    ),
    "status": ("Say where every q_id stands.", _status_flags, _status),
    "verify": ("Check that results are complete, undamaged and agree; no model is opened.", _verify_flags, _verify),
    "report": ("Make the page of every relation of a results folder again.", _report_flags, _report),
    "figure": (FIGURE_HELP, figure_flags, figure),
    "export": ("Write the tables of every relation of a results folder again.", _export_flags, _export),
    "import": ("Make a relation CSV of other projects' word pairs.", _import_flags, _import),
    "stepd": (
        "StepD of one q_id: trials, mean activations, effect of every head.",
        stages.step_d_flags,
        stages.step_d,
    ),
    "heatmap": (
        "Heatmap of layers x heads from StepD's scores.",
        stages.heatmap_flags,
        stages.heatmap,
    ),
    "stepe": (
        "StepE: top heads and function vector, and the zero-shot snapshot.",
        stages.step_e_flags,
        stages.step_e,
    ),
    "zeroshot": (
        "The zero-shot snapshot of frozen trials.",
        stages.zero_shot_flags,
        stages.zero_shot,
    ),
    "step6": ("Step6: inject the function vector at one layer.", stages.step6_flags, stages.step6),
    "completion": (
        "Print a script that completes commands and flags in your shell.",
        _completion_flags,
        _completion,
    ),
    "demo-model": ("Train the embedded demo model.", _demo_flags, _demo),
}
