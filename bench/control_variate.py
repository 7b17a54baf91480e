"""Do attribution estimates on many trials and exact effects on 25 narrow the interval of a head's effect?

    python bench/control_variate.py --model demo --q_list Q1,Q4,Q15 --n_trials 200

Of one relation's trials, drawn by the policy of a run, all have exact effects and estimates. Again and again 25 of them
are taken for the exact ones, and the mean over them is corrected by estimates: exact mean - b (their estimates' mean -
the mean of all estimates), b from the 25. Printed, of the heads with the largest effects: the correlation over trials,
the share of the variance that is left by it (1 - rho^2 at best), the one that is left in truth, and seconds.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from relfv.engine.clean import run_clean
from relfv.engine.gradients import attribute
from relfv.language_model import open_model
from relfv.relations import load_relations
from relfv.settings import Settings
from relfv.stages.cie import head_effects, heads_to_sweep
from relfv.stages.means import mean_activations
from relfv.stages.prompts import prompts_to_read
from relfv.stages.trials import draw
from relfv.types import MeanActivations

N_EXACT, N_DRAWS, TOP = 25, 400, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--relation_csv_path", type=Path, default=Path("datasets/relation/relationA_ex.csv"))
    parser.add_argument("--q_list", default="Q1,Q4,Q15")
    parser.add_argument("--n_trials", type=int, default=200)
    args = parser.parse_args()
    settings = Settings(model=args.model, model_spec="auto", n_trials_per_q=args.n_trials)
    model = open_model(args.model)
    relations = load_relations(args.relation_csv_path)
    for q_id in args.q_list.split(","):
        prompted, _ = draw(relations[q_id], settings, model.tokens)
        targets = [item.target for item in prompted]
        clean, corrupted = (
            prompts_to_read(
                [getattr(item, f"{kind}_prompt") for item in prompted], targets, model.tokens, [0] * len(targets)
            )
            for kind in ("clean", "corrupted")
        )
        means: MeanActivations = mean_activations(run_clean(model.backbone, clean[:N_EXACT]))
        began = time.monotonic()
        exact = head_effects(model, corrupted, means, heads_to_sweep(model, settings)).effects.delta("p")
        exact_s, began = time.monotonic() - began, time.monotonic()
        estimates = attribute(model.backbone, corrupted, torch.from_numpy(means.values), "p").first_order
        cheap_s = time.monotonic() - began
        cheap = estimates.flatten(1).numpy()[:, : exact.shape[1]]
        print(
            q_id, *_compared(exact, cheap), f"exact {exact_s:.1f} s, estimates with GradDrop {cheap_s:.1f} s", sep="; "
        )


def _compared(exact: np.ndarray, cheap: np.ndarray) -> list[str]:
    top = np.argsort(-exact.mean(0))[:TOP]
    exact, cheap = exact[:, top], cheap[:, top]
    rho = np.array([np.corrcoef(exact[:, i], cheap[:, i])[0, 1] for i in range(len(top))])
    rng = np.random.default_rng(0)
    plain, corrected = [], []
    for _ in range(N_DRAWS):
        some = rng.choice(len(exact), N_EXACT, replace=False)
        y, x = exact[some], cheap[some]
        slope = ((x - x.mean(0)) * (y - y.mean(0))).sum(0) / np.maximum(((x - x.mean(0)) ** 2).sum(0), 1e-300)
        plain.append(y.mean(0) - exact.mean(0))
        corrected.append(y.mean(0) - slope * (x.mean(0) - cheap.mean(0)) - exact.mean(0))
    left = (np.array(corrected) ** 2).mean(0) / (np.array(plain) ** 2).mean(0)
    quartiles = " / ".join(f"{value:.2f}" for value in np.percentile(left, [25, 50, 75]))
    return [
        f"median rho {np.median(rho):.2f}, 1 - rho^2 {np.median(1 - rho**2):.2f}",
        f"variance left {quartiles} (quartiles over {len(top)} heads), of the best 5 {left[:5].mean():.2f}",
    ]


if __name__ == "__main__":
    main()
