"""The commands of whole runs and of finished ones: run, doctor, compare, cross, aggregate. For each, its flags besides
settings, and the function it calls."""

from __future__ import annotations

import argparse
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from relfv.commands.flags import DEFAULTS, path_flag, q_ids_from, settings_from, whole_number
from relfv.errors import InputError
from relfv.settings import DEFAULT_OUT_ROOT, MOST, MOST_PER_CARD, SPEC_CSV

if TYPE_CHECKING:
    from relfv.runs.plan import RunRequest


def _request_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--q_list", default=None, help="q_ids, separated by commas, or all (default: all)")
    group.add_argument(
        "--out_root", type=path_flag, default=DEFAULT_OUT_ROOT, help="results go to OUT_ROOT/<csv name>/<q_id>"
    )
    group.add_argument(
        "--force", action="store_true", help="move earlier results of these q_ids aside and start afresh"
    )
    group.add_argument(
        "--config",
        type=path_flag,
        help="run again what a run_manifest.json records: its settings and q_ids; flags override them",
    )
    group.add_argument(
        "--reuse_stepd",
        type=path_flag,
        metavar="FROM",
        help="take StepD's files from these results, made with the same StepD settings: other alpha, topk or n_eval",
    )


def run_flags(parser: argparse.ArgumentParser) -> None:
    _request_flags(parser)
    parser.add_argument(
        "--ray", nargs="?", const="auto", metavar="ADDRESS", help="run the q_ids on a Ray cluster: the one that is "
        "there, at an address, or local (needs relfv[ray], and a results folder that all nodes share)"
    )  # fmt: skip
    parser.add_argument(
        "--gpus_per_worker", type=_gpus, default=1.0, metavar="G", help="GPUs of each --ray worker; 0 for CPU workers, "
        "0.5 for two workers a GPU"
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=whole_number(1, MOST), default=None, metavar="N", help="--ray workers (default: all that fit)"
    )
    parser.add_argument(
        "--shard",
        type=_shard,
        metavar="I/N",
        help="only the I-th of every N q_ids: for N runs on a file system "
        "without locks; 'relfv report' afterwards makes what tells of all",
    )
    parser.add_argument(
        "--devices", default="", metavar="A,B", help="share the q_ids out to a process on each of these devices, such "
        "as cuda:0,cuda:1; all = every CUDA device (in place of --device)"
    )  # fmt: skip
    parser.add_argument(
        "--per_card", type=whole_number(1, MOST_PER_CARD), default=1, metavar="N", help="processes on a device, each "
        "with its part of the memory: one computes while others write"
    )  # fmt: skip
    parser.add_argument(
        "--plan", type=path_flag, metavar="JSON", help="register hypotheses, a layer rule and exclusions before "
        "anything is computed; the report says whether they held"
    )  # fmt: skip
    parser.add_argument(
        "--dry_run", action="store_true", help="say what would be done, and do nothing; 'relfv doctor' also measures"
    )


def _shard(text: str) -> tuple[int, int]:
    i, slash, n = text.partition("/")
    if not (slash and i.isdecimal() and n.isdecimal() and 1 <= int(i) <= int(n)):
        raise argparse.ArgumentTypeError(f"invalid value: {text[:40]!r}; expected such as 2/4, from 1/4 to 4/4")
    return int(i), int(n)


def _gpus(text: str) -> float:
    with suppress(ValueError):
        if 0 <= (gpus := float(text)) <= 64 and (gpus <= 1 or gpus.is_integer()):
            return gpus
    raise argparse.ArgumentTypeError(f"invalid value: {text[:40]!r}; expected such as 0, 0.5, 1 or 2")


def _request(args: argparse.Namespace) -> RunRequest:
    from relfv.runs.manifest import recorded_run
    from relfv.runs.plan import RunRequest

    recorded, q_ids = recorded_run(args.config) if args.config else (DEFAULTS, ["all"])
    settings = settings_from(args, recorded, environment=not args.config)
    if args.config and settings.model != recorded.model and "dtype" not in args:  # recorded dtype: of its own model
        settings = replace(settings, dtype="auto")
    q_list = ",".join(q_ids) if args.q_list is None else args.q_list
    return RunRequest(settings, q_ids_from(q_list), args.out_root, force=args.force, reuse_stepd=args.reuse_stepd)


def run(args: argparse.Namespace) -> int:
    from relfv.runs.plan import OnRay, devices_from
    from relfv.runs.run import run_all

    if args.devices and getattr(args, "device", ""):
        raise InputError(f"--device {args.device} and --devices {args.devices}: expected one of the two")
    if args.devices and args.ray:
        raise InputError(f"--ray {args.ray} and --devices {args.devices}: expected one of the two")
    if args.workers is not None and not args.ray:
        raise InputError(
            f"--workers {args.workers}: is of --ray; expected --ray too, or --devices or --per_card instead"
        )
    if args.per_card > 1 and args.ray:
        gpus = f"{10_000 // args.per_card / 10_000:g}"  # rounded down: Ray fits one process less of a larger share
        raise InputError(f"--ray {args.ray} and --per_card {args.per_card}: use --gpus_per_worker {gpus} for that")
    on_ray = OnRay(args.ray, args.gpus_per_worker, args.workers) if args.ray else None
    where = {"ray": on_ray, "devices": devices_from(args.devices), "per_card": args.per_card}
    return run_all(replace(_request(args), dry_run=args.dry_run, shard=args.shard, plan=args.plan, **where))


def doctor_flags(parser: argparse.ArgumentParser) -> None:
    _request_flags(parser)
    parser.add_argument("--json", action="store_true", help="print all that is found as JSON")


def doctor(args: argparse.Namespace) -> int:
    from relfv.runs import doctor as before_a_run

    return before_a_run.doctor(_request(args), as_json=args.json)


def compare_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders", type=path_flag, nargs="+", metavar="folder", help="all results, or a relation's; the first is what "
        "the others are compared with"
    )  # fmt: skip
    parser.add_argument("--q_list", default="all", help="q_ids, separated by commas, or all that they share")
    parser.add_argument(
        "--out_dir", type=path_flag, default=Path("results_fv/comparison"), help="compare.csv, .svg and .html go here"
    )


def compare(args: argparse.Namespace) -> int:
    from relfv.runs import compare as of_results

    return of_results.compare(args.folders, q_ids_from(args.q_list), args.out_dir)


def cross_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", type=path_flag, nargs="?", default=DEFAULT_OUT_ROOT / SPEC_CSV.stem, help="a relation's results"
    )
    parser.add_argument("--q_list", default="all", help="q_ids, separated by commas, or all that are completed")


def cross(args: argparse.Namespace) -> int:
    from relfv.runs import cross as of_vectors

    return of_vectors.cross(args.folder, q_ids_from(args.q_list), lambda base: settings_from(args, base))


def aggregate_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder",
        type=path_flag,
        nargs="?",
        default=DEFAULT_OUT_ROOT / SPEC_CSV.stem,
        help="a relation's results, or a folder that holds several of them",
    )
    parser.add_argument(
        "--q_list", default="all", help="q_ids (<REL>/<Q> of several), separated by commas, or all that are completed"
    )
    parser.add_argument("--all", action="store_true", help="count relations that the model cannot do, too")
    parser.add_argument(
        "--no_model", action="store_true", help="what files give alone: no relation is left out that was not before"
    )


def aggregate(args: argparse.Namespace) -> int:
    from relfv.runs import aggregate as of_relations

    q_list, overlay = q_ids_from(args.q_list), lambda base: settings_from(args, base)
    return of_relations.aggregate(args.folder, q_list, overlay, keep_all=args.all, no_model=args.no_model)
