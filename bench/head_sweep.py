"""The head sweep against the ways it is done elsewhere: time, memory, and error against plain float32, in one run.

    python bench/head_sweep.py --shape llama-3.1-8b     # on a GPU with 40 GB or more
    python bench/head_sweep.py --shape demo             # on any machine

Ways compared, all on the same model, trials and clean means:

- naive: one forward pass per (trial, head), as the code published with Todd et al. (2024) does it; in the
  checkpoint's dtype, through this package's plain hooks, the vocabulary projection for the last token alone.
- by layer: the heads of a layer are the rows of one batch of whole forward passes (the usual improvement).
- relfv exact, relfv fast: the shared-prefix engine in its two precisions.

The truth is the shared-prefix engine without kernels in float32 (no TF32), itself compared here with hooks in the same
arithmetic on some heads. Where a way would take too long, a stated number of its forward passes is timed
and multiplied; its errors are those of the passes that were run.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from relfv.engine.arithmetic import Arithmetic
from relfv.engine.base import Backbone
from relfv.engine.passes import capture_heads, last_hidden
from relfv.engine.reference import ReferenceEngine, naive_baseline, naive_head_patch
from relfv.engine.shared_prefix import SharedPrefixEngine
from relfv.language_model import LanguageModel, open_model
from relfv.relations import load_relations
from relfv.stages.prompts import AnswerTokens, prompts_to_read
from relfv.stages.trials import sample_trials
from relfv.types import Effects, HeadId, Prompts
from shapes import NAMES, model_folder

DATASET = Path(__file__).parent.parent / "datasets" / "relation" / "relationA_ex.csv"
TOP = 20


def main() -> None:
    """Parse, run, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=NAMES, default="demo")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--work", type=Path, default=None, help="keeps the random model between runs")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each fast way, after one to warm up")
    parser.add_argument("--naive", type=int, default=64, help="forward passes of the naive way to run")
    parser.add_argument("--by_layer", type=int, default=1, help="trials of the by-layer way to run, 0 for none")
    parser.add_argument("--truth", type=int, default=16, help="heads on which the truth is compared with plain hooks")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        model = open_model(model_folder(args.shape, args.work or Path(temporary)), device=args.device)
        print(bench(args, model))


class Sweep:
    """One q_id's sweep: corrupted prompts, targets and clean means of 25 trials."""

    def __init__(self, model: LanguageModel, shape: str, csv: Path = DATASET, q_id: str = "Q1") -> None:
        if shape == "demo":
            relation = load_relations(csv)[q_id]
            trials = sample_trials(relation, seed=0, n_trials=25, n_demos=9)
            prompted = [AnswerTokens(relation, model.tokens).prompted(trial) for trial in trials]
            targets, rows = [item.target for item in prompted], [trial.query_source_index for trial in trials]
            texts = [item.corrupted_prompt for item in prompted], [item.clean_prompt for item in prompted]
            corrupted, right = (prompts_to_read(its, targets, model.tokens, rows) for its in texts)
            self.prompts, clean, self.targets = corrupted.ids, right.ids, corrupted.targets
        else:  # an untrained model knows no words: ids of the lengths that Llama's tokenizer gives
            rng = random.Random(0)
            vocabulary = int(model.arch.lm_head.weight.shape[0])  # type: ignore[union-attr]
            clean = [[rng.randrange(vocabulary) for _ in range(rng.randint(65, 85))] for _ in range(25)]
            self.prompts = [[*rng.sample(ids[:-3], len(ids) - 3), *ids[-3:]] for ids in clean]
            self.targets = []
        float32 = model.backbone.plain().in_float32()
        with float32.running():
            if (
                not self.targets
            ):  # what the model says to the corrupted prompt: its probability is one that a patch can move
                hidden = torch.cat([last_hidden(float32, [ids]) for ids in self.prompts])
                self.targets = float32.arch.lm_head(hidden.float()).argmax(-1).tolist()
            z = torch.cat([capture_heads(float32, [ids])[0] for ids in clean])
        self.means = z.double().mean(0).float()
        arch = model.arch
        self.heads = [HeadId(layer, head) for layer in range(arch.n_layers) for head in range(arch.n_heads)]


def bench(args: argparse.Namespace, model: LanguageModel) -> str:
    """Run every way and lay the results out."""
    sweep = Sweep(model, args.shape)
    arch, device = model.arch, model.backbone.device
    exact = model.backbone
    fast = Backbone(exact.model, arch, device, Arithmetic.with_kernels(exact.model, arch, "fast"))
    float32 = exact.plain().in_float32()
    n_patches = len(sweep.prompts) * len(sweep.heads)
    rows: list[list[str]] = []

    truth, truth_s, truth_gib = timed(device, 1, lambda: run(SharedPrefixEngine(float32), sweep), warm=False)
    checked = truth_error(float32, sweep, truth, args.truth)
    rows.append(
        ["float32 without TF32 (truth)", f"{truth_s:.2f}", "", f"{truth_gib:.1f}", f"hooks: {checked:.1e}", "", ""]
    )

    plain_s, naive_errors = naive(fast.plain(), sweep, truth, args.naive)
    naive_s = plain_s * (n_patches + len(sweep.prompts))
    rows.append(["naive", f"{naive_s:.0f}", "1", "", *naive_errors, f"{args.naive} passes run"])

    if args.by_layer:
        some = sweep_part(sweep, args.by_layer)
        by_layer, seconds, gib = timed(device, 1, lambda: run(ReferenceEngine(fast.plain()), some), warm=False)
        seconds *= len(sweep.prompts) / args.by_layer
        rows.append(["by layer", f"{seconds:.1f}", ratio(naive_s, seconds), f"{gib:.1f}",
                     *errors(by_layer, truth, sweep), f"{args.by_layer} trials run"])  # fmt: skip

    for name, backbone in (("relfv exact", exact), ("relfv fast", fast)):
        found, seconds, gib = timed(device, args.repeats, lambda b=backbone: run(SharedPrefixEngine(b), sweep))
        rows.append([f"**{name}**", f"{seconds:.3f}", ratio(naive_s, seconds), f"{gib:.1f}",
                     *errors(found, truth, sweep), share(model, sweep, seconds)])  # fmt: skip
    for name, backbone in (("exact, no kernels", exact.plain()), ("fast, no kernels", fast.plain())):
        found, seconds, gib = timed(device, args.repeats, lambda b=backbone: run(SharedPrefixEngine(b), sweep))
        rows.append([f"relfv {name}", f"{seconds:.3f}", ratio(naive_s, seconds), f"{gib:.1f}",
                     *errors(found, truth, sweep), share(model, sweep, seconds)])  # fmt: skip
    return "\n".join([
        header(args, model, sweep),
        "| way | sweep, s | times naive | peak GiB | error of delta_p: median, max | top 20 of 20 | |",
        "|---|---|---|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        injections(args, model, sweep, fast),
    ])  # fmt: skip


def run(engine: Any, sweep: Any) -> Effects:
    """The sweep by one engine."""
    return engine.sweep_heads(Prompts(sweep.prompts, sweep.targets), sweep.means, sweep.heads)


def sweep_part(sweep: Sweep, n_trials: int) -> Any:
    """The same with its first trials alone."""
    return argparse.Namespace(
        prompts=sweep.prompts[:n_trials], targets=sweep.targets[:n_trials], means=sweep.means, heads=sweep.heads
    )


def timed(
    device: torch.device, repeats: int, work: Callable[[], Any], *, warm: bool = True
) -> tuple[Any, float, float]:
    """-> the result, the median of seconds, peak GiB on the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if warm:
        work()
    seconds = []
    for _ in range(repeats):
        wait(device)
        started = time.perf_counter()
        result = work()
        wait(device)
        seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan")
    return result, statistics.median(seconds), peak


def wait(device: torch.device) -> None:
    """For everything queued on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def naive(backbone: Backbone, sweep: Sweep, truth: Effects, n_passes: int) -> tuple[float, list[str]]:
    """Seconds of one forward pass, and the errors of patches sampled over trials and heads."""
    rng = random.Random(1)
    heads = [rng.randrange(len(sweep.heads)) for _ in range(n_passes)]
    trials = [index % len(sweep.prompts) for index in range(n_passes)]
    device = backbone.device
    base: dict[int, float] = {}
    gaps = []
    with backbone.running():
        for trial in set(trials):
            base[trial] = float(naive_baseline(backbone, sweep.prompts[trial], sweep.targets[trial]).p)
        wait(device)
        started = time.perf_counter()
        for trial, index in zip(trials, heads, strict=True):
            head = sweep.heads[index]
            p = naive_head_patch(
                backbone, sweep.prompts[trial], sweep.targets[trial], head, sweep.means[head.layer, head.head]
            ).p
            gaps.append(abs(float(p) - base[trial] - true_delta_p(truth)[trial, index].item()))
        wait(device)
    return (time.perf_counter() - started) / n_passes, [f"{statistics.median(gaps):.1e}, {max(gaps):.1e}", ""]


def truth_error(float32: Backbone, sweep: Sweep, truth: Effects, n_heads: int) -> float:
    """Largest difference in delta_p between the truth and plain hooks, on some heads of two trials."""
    rng = random.Random(2)
    worst = 0.0
    with float32.running():
        for trial in (0, 1):
            base = float(naive_baseline(float32, sweep.prompts[trial], sweep.targets[trial]).p)
            for index in rng.sample(range(len(sweep.heads)), n_heads // 2):
                head = sweep.heads[index]
                p = naive_head_patch(
                    float32, sweep.prompts[trial], sweep.targets[trial], head, sweep.means[head.layer, head.head]
                ).p
                worst = max(worst, abs(float(p) - base - true_delta_p(truth)[trial, index].item()))
    return worst


def true_delta_p(effects: Effects) -> torch.Tensor:
    """float64 (trial, head)."""
    return torch.from_numpy(effects.delta("p"))


def errors(found: Effects, truth: Effects, sweep: Sweep) -> list[str]:
    """Of delta_p, over all patches that were run; and how many of the true top 20 heads are found."""
    delta, true = true_delta_p(found), true_delta_p(truth)
    gap = (delta - true[: len(delta)]).abs()
    text = f"{gap.median():.1e}, {gap.max():.1e}"
    top = "" if len(delta) < len(true) else str(len(best(delta) & best(true)))
    return [text, top]


def best(delta: torch.Tensor) -> set[int]:
    """The heads with the largest mean over trials."""
    return set(delta.mean(0).topk(min(TOP, delta.shape[1])).indices.tolist())


def ratio(slow: float, quick: float) -> str:
    """How many times faster."""
    return f"{slow / quick:,.0f}"


def flops(model: LanguageModel, sweep: Sweep) -> float:
    """Multiply-adds, times two, that the shared-prefix algorithm cannot avoid: linear layers and vocabulary."""
    arch = model.arch
    heads, trials = arch.n_heads, len(sweep.prompts)
    prefix = sum(len(prompt) - 1 for prompt in sweep.prompts)
    blocks = 0.0
    for layer, block in enumerate(arch.blocks):
        weights = sum(p.numel() for p in block.parameters() if p.dim() == 2)
        blocks += 2.0 * weights * (prefix + trials * (1 + heads * (layer + 1)))
    return blocks + 2.0 * arch.lm_head.weight.numel() * trials * (1 + len(sweep.heads))  # type: ignore[union-attr]


def ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product on random numbers."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    _, seconds, _ = timed(device, 10, lambda: a @ b)
    return 2.0 * size**3 / seconds


def share(model: LanguageModel, sweep: Sweep, seconds: float) -> str:
    """Of the time that a bf16 product of the same FLOPs would take."""
    if model.backbone.device.type != "cuda":
        return ""
    work = flops(model, sweep)
    most = ceiling(model.backbone.device, torch.bfloat16)
    return f"{work / seconds / 1e12:.0f} TFLOP/s, {work / seconds / most:.0%} of {most / 1e12:.0f}"


def injections(args: argparse.Namespace, model: LanguageModel, sweep: Sweep, fast: Backbone) -> str:
    """Step6's pass: one vector at every layer, on prompts of seven tokens."""
    device, arch = model.backbone.device, model.arch
    prompts = [prompt[-7:] for prompt in sweep.prompts]
    vector = torch.stack([arch.project_head(arch.n_layers // 2, 0, sweep.means[arch.n_layers // 2, 0]).float()])
    layers = range(arch.n_layers)
    lines = []
    for name, backbone in (("exact", model.backbone), ("fast", fast)):

        def inject(backbone: Backbone = backbone) -> Effects:
            """By a new engine: one that has just seen these prompts has their prefixes."""
            return SharedPrefixEngine(backbone).inject(Prompts(prompts, sweep.targets), vector, layers)

        _, seconds, _ = timed(device, args.repeats, inject)
        lines.append(f"Step6, {arch.n_layers} layers x {len(prompts)} prompts, {name}: {seconds:.3f} s")
    return "\n".join(lines)


def header(args: argparse.Namespace, model: LanguageModel, sweep: Sweep) -> str:
    """What was measured on what."""
    device = model.backbone.device
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    lengths = [len(prompt) for prompt in sweep.prompts]
    return (
        f"{args.shape}, {name}, torch {torch.__version__}, transformers {transformers.__version__}; {len(lengths)} "
        "trials "
        f"of {min(lengths)} to {max(lengths)} tokens, {len(sweep.heads)} heads; {model.check.reason}\n"
    )


if __name__ == "__main__":
    main()
