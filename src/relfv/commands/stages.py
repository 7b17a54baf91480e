"""The commands of single stages, as the spec's sections 5 to 9 have them: for each, its flags besides settings, and the
function it calls."""

from __future__ import annotations

import argparse

from relfv.commands.flags import DEFAULTS, path_flag, q_ids_from, settings_from, whole_number
from relfv.errors import InputError
from relfv.settings import MOST, SCORE_KEYS


def step_d_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--relation_q_list", required=True, help="the q_id to run (one)")
    parser.add_argument(
        "--out_base_dir", type=path_flag, required=True, help="folder of the q_id; artifacts/ is made in it"
    )


def step_d(args: argparse.Namespace) -> int:
    from relfv.runs.single import run_step_d

    q_ids = q_ids_from(args.relation_q_list)
    if q_ids is None or len(q_ids) != 1:
        raise InputError(
            f"--relation_q_list {args.relation_q_list!r}: expected one q_id a run; relfv run does them all"
        )
    return run_step_d(settings_from(args), q_ids[0], args.out_base_dir)


def heatmap_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--in_dir", type=path_flag, required=True, help="the q_id's artifacts folder")
    parser.add_argument("--metric", choices=SCORE_KEYS, default=DEFAULTS.score_key, help="column to draw")
    parser.add_argument("--topk", type=whole_number(1, MOST), default=DEFAULTS.topk, help="heads to mark")
    parser.add_argument("--out_name", default=None, help="file name within --in_dir (default: aie_heatmap_<Q>.png)")


def heatmap(args: argparse.Namespace) -> int:
    from relfv.runs.single import run_heatmap

    return run_heatmap(args.in_dir, args.metric, args.topk, args.out_name)


def step_e_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stepd_artifacts_dir", type=path_flag, required=True, help="StepD's artifacts folder")
    parser.add_argument("--sampled_trials_path", type=path_flag, required=True, help="StepD's sampled_trials.json")
    parser.add_argument("--out_dir", type=path_flag, required=True, help="where the vector goes")


def step_e(args: argparse.Namespace) -> int:
    from relfv.runs.single import run_step_e

    paths = args.stepd_artifacts_dir, args.sampled_trials_path, args.out_dir
    return run_step_e(*paths, lambda base: settings_from(args, base))


def zero_shot_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sampled_trials_path", type=path_flag, required=True, help="StepD's sampled_trials.json")
    parser.add_argument(
        "--out_path", type=path_flag, default=None, help="default: sampled_trials_zeroshot.json beside it"
    )


def zero_shot(args: argparse.Namespace) -> int:
    from relfv.runs.single import run_zero_shot

    return run_zero_shot(args.sampled_trials_path, args.out_path)


def step6_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--fv_global_path", type=path_flag, required=True, help="StepE's fv_global_resid.pt")
    parser.add_argument("--sampled_trials_path", type=path_flag, required=True, help="sampled_trials_zeroshot.json")
    parser.add_argument("--edit_layer", type=int, required=True, help="the layer to inject at (one; loop outside)")
    parser.add_argument("--out_dir", type=path_flag, required=True, help="where this layer's results go")


def step6(args: argparse.Namespace) -> int:
    from relfv.runs.single import run_step6

    paths = args.fv_global_path, args.sampled_trials_path, args.edit_layer, args.out_dir
    return run_step6(*paths, lambda base: settings_from(args, base))
