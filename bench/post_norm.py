"""What carries a relation where a family norms or scales what attention writes: the vector as defined, the heads put
in place, what they really write.

    python bench/post_norm.py --model PATH      # e.g. a folder with gemma-3-270m; minutes a relation on a CPU

Runs two small relations through ``relfv run`` and prints P and accuracy on the zero-shot prompts from controls.json,
sweeps.json and summary.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from relfv.cli import main as relfv

RELATIONS = {
    "capital": (
        "France-Paris Japan-Tokyo Germany-Berlin Italy-Rome Spain-Madrid Russia-Moscow China-Beijing Egypt-Cairo "
        "Greece-Athens Poland-Warsaw Austria-Vienna Norway-Oslo Cuba-Havana Peru-Lima Iraq-Baghdad Iran-Tehran "
        "Ireland-Dublin Portugal-Lisbon Kenya-Nairobi Sweden-Stockholm"
    ),
    "past": (
        "go-went see-saw take-took give-gave come-came make-made eat-ate run-ran write-wrote speak-spoke break-broke "
        "drive-drove fall-fell know-knew grow-grew sing-sang begin-began find-found think-thought buy-bought"
    ),
}
ALPHAS = (3, 10, 30, 100)
SHARES = (0.1, 0.3, 1)


def main() -> None:
    """Parse, run, print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--relations", nargs="+", choices=RELATIONS, default=list(RELATIONS))
    parser.add_argument("--n_trials", default="12")
    parser.add_argument("--n_demos", default="5")
    parser.add_argument("--topk", default="20")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = run(args, Path(temporary))
        print(table({q_id: folder / q_id / "artifacts" for q_id in args.relations}))


def run(args: argparse.Namespace, work: Path) -> Path:
    """All relations -> the folder of their results."""
    pairs = work / "post_norm.csv"
    rows = [f"{q_id},{pair.replace('-', ',')}" for q_id in args.relations for pair in RELATIONS[q_id].split()]
    pairs.write_text("\n".join(["id,ex_A,ex_B", *rows, ""]))
    code = relfv(
        ["run", "--model", args.model, "--model_spec", "auto", "--relation_csv_path", str(pairs),
         "--out_root", str(work / "out"), "--n_trials_per_q", args.n_trials, "--n_demos", args.n_demos,
         "--topk", args.topk, "--alpha_sweep", ",".join(map(str, ALPHAS)),
         "--alpha_sweep_relative", ",".join(map(str, SHARES))]
    )  # fmt: skip
    if code:
        raise SystemExit(code)
    return work / "out" / pairs.stem


def table(artifacts: Mapping[str, Path]) -> str:
    """A row for each thing that is done to the zero-shot prompts, a column for each relation."""
    columns = {q_id: rows_of(folder) for q_id, folder in artifacts.items()}
    first = next(iter(columns.values()))
    lines = [f"| what is done to the zero-shot prompt | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    lines += [f"| {name} | {' | '.join(column[name] for column in columns.values())} |" for name in first]
    verdicts = [json.loads((folder / "summary.json").read_text())["verdict"] for folder in artifacts.values()]
    return "\n".join([*lines, "", *verdicts])


def rows_of(folder: Path) -> dict[str, str]:
    """What was done -> P, accuracy, and the layer where there is a best one."""
    controls = json.loads((folder / "step6/controls.json").read_text())
    sweeps = json.loads((folder / "step6/sweeps.json").read_text())

    def best(name: str) -> str:
        if name not in controls["meaning"]:
            return "as defined"
        layer = max(controls["per_layer"], key=lambda layer: controls["per_layer"][layer][name]["mean_p"] or 0)
        return f"{said(controls['per_layer'][layer][name])} (layer {layer})"

    at_once = {name: said(numbers) for name, numbers in controls["at_once"]["numbers"].items()}
    written = controls["as_written"]
    hidden = [*controls["mean_norm_hidden"].values()]
    lengths = f"{written['fv_norm']:.0f}, {written['norm']:.0f}, {min(hidden):.0f} to {max(hidden):.0f}"
    return {
        "n prompts": str(controls["n_eval"]),
        "nothing": said(controls["zero_shot"]),
        "length of the FV as defined, as written, of hidden states": lengths,
        "the FV as defined, best layer": best("fv"),
        **{
            f"the same, {kind} {entry['value']:g}, best layer": f"{said(entry)} (layer {entry['best_layer']})"
            for kind in ("alpha", "alpha_relative")
            for entry in sweeps[kind]
        },
        "the heads as written, summed, best layer": best("as_written"),
        "the same held out": best("as_written_held_out"),
        "other heads as written, summed, best layer": best("random_heads_as_written"),
        "random directions of the FV's length, best layer": best("random_direction"),
        "each layer's part as written, at its own layer": at_once["as_written_by_layer"],
        "the same held out, by layer": at_once["as_written_by_layer_held_out"],
        "other heads' parts at their own layers": at_once["random_heads_as_written_by_layer"],
        "**the heads' means put in place**": at_once["heads_in_place"],
        "the same held out, in place": at_once["heads_in_place_held_out"],
        "other heads' means put in place": at_once["random_heads_in_place"],
    }


def said(numbers: Mapping[str, Any]) -> str:
    """P, accuracy."""
    p = numbers["mean_p"]
    return f"{'overflows' if p is None else format(p, '.3f')}, {numbers['acc']:.2f}"


if __name__ == "__main__":
    main()
