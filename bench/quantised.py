"""Weights in 8 and 4 bits against bf16: time, memory, parity with plain hooks, and what packing does to the top heads.

    python bench/quantised.py                            # an 8B shape, on a GPU with 40 GB or more
    python bench/quantised.py --shape demo               # on any machine
    python bench/quantised.py --shape none --layers 80   # a 70B shape in 4 bit, on a GPU of 80 GB
    python bench/quantised.py --model <folder> --csv <csv> --q_id Q1   # a trained model of your own

Each packed model is opened by ``--quant`` from the same bf16 checkpoint. For the demo model, which is trained, prompts
are those of a relation; other shapes have random weights, whose scores say nothing about language. "hooks" is the
largest difference in delta_p between the sweep and plain hooks on that same packed model, both in float32, and
"bitsandbytes" that between plain hooks through the package's own products and through weights read in 16 bits, on the
same patches. The 70B shape is made block by block on the card: each is drawn at random and packed before the next.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from head_sweep import DATASET, Sweep, best, flops, run, timed, true_delta_p
from relfv.engine.arithmetic import Arithmetic
from relfv.engine.base import Backbone
from relfv.engine.reference import naive_baseline, naive_head_patch
from relfv.engine.selfcheck import choose_engine
from relfv.engine.shared_prefix import SharedPrefixEngine
from relfv.language_model import LanguageModel, open_model
from relfv.models.architecture import resolve
from relfv.types import HeadId, Prompts
from shapes import NAMES, llama_config, model_folder
from streaming import STD, TINY, WIDE

PRECISIONS = ("exact", "fast")


def main() -> None:
    """Parse, run, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=(*NAMES, "none"), default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, default=0, help="of the 70B shape; 0 leaves it out")
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny shape in place of the 70B one, to see that it works"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--model", default="", help="a trained model in place of a shape")
    parser.add_argument("--csv", type=Path, default=DATASET, help="relations for a trained model")
    parser.add_argument("--q_id", default="Q1", help="the relation for a trained model")
    parser.add_argument("--work", type=Path, default=None, help="keeps the random model between runs")
    parser.add_argument(
        "--repeats", type=int, default=3, help="timed sweeps of the smaller shape, after one to warm up"
    )
    parser.add_argument("--patches", type=int, default=24, help="patches compared with plain hooks")
    args = parser.parse_args()
    import bitsandbytes

    cuda = torch.cuda.is_available()
    print(f"{torch.cuda.get_device_name() if cuda else 'CPU'}, torch {torch.__version__}, transformers "
          f"{transformers.__version__}, bitsandbytes {bitsandbytes.__version__}", flush=True)  # fmt: skip
    if args.layers:
        print(large(args, TINY if args.tiny else WIDE), flush=True)
    if args.model:
        args.shape = "demo"  # prompts of a relation
        print(compared(args, args.model), flush=True)
    elif args.shape != "none":
        with tempfile.TemporaryDirectory() as temporary:
            print(compared(args, model_folder(args.shape, args.work or Path(temporary))), flush=True)


def compared(args: argparse.Namespace, folder: str) -> str:
    """The shape in bf16, 8 and 4 bits: a table."""
    rows: list[list[str]] = []
    first: Any = None
    for quant in ("none", "8bit", "4bit"):
        started = time.perf_counter()
        model = open_model(folder, device=args.device, quant=quant)
        opening = time.perf_counter() - started
        sweep = Sweep(model, args.shape, args.csv, args.q_id)
        if first is None:
            first = sweep, flops(model, sweep), {}
        sweep.prompts, sweep.targets = first[0].prompts, first[0].targets
        print(f"{quant}: open in {opening:.1f} s; {model.engine.name}: {model.check.reason}", flush=True)
        for precision in PRECISIONS:
            rows.append(one_row(args, model, sweep, quant, precision, first))
            print(rows[-1], flush=True)
        del model, sweep
        gc.collect()
    return table(
        "| weights | arithmetic | GiB | peak GiB | sweep, s | TFLOP/s | top 20 of bf16's | hooks | bitsandbytes |",
        rows,
    )


def one_row(
    args: argparse.Namespace, model: LanguageModel, sweep: Sweep, quant: str, precision: Any, first: Any
) -> list[str]:
    """One model in one arithmetic."""
    arithmetic = Arithmetic.with_kernels(model.backbone.model, model.arch, precision)
    backbone = Backbone(model.backbone.model, model.arch, model.backbone.device, arithmetic)
    found, seconds, gib = timed(backbone.device, args.repeats, lambda: run(SharedPrefixEngine(backbone), sweep))
    _, work, true = first
    delta = true_delta_p(found)
    if quant == "none":
        true[precision] = best(delta)
    hooks, package = "", ""
    if precision == "exact":
        hooks, package = against_hooks(args, backbone, sweep, delta, packed=quant != "none")
    weights = f"{backbone.weights_on_device / 2**30:.1f}"
    return [
        model.dtype if quant == "none" else quant, precision, weights, f"{gib:.1f}",
        f"{seconds:.3f}", f"{work / seconds / 1e12:.0f}", str(len(best(delta) & true[precision])), hooks, package,
    ]  # fmt: skip


def against_hooks(
    args: argparse.Namespace, backbone: Backbone, sweep: Sweep, delta: torch.Tensor, *, packed: bool
) -> tuple[str, str]:
    """The largest difference of sampled patches from plain hooks; and those hooks' through bitsandbytes' products."""
    rng = random.Random(1)
    chosen = [(rng.randrange(len(sweep.prompts)), rng.randrange(len(sweep.heads))) for _ in range(args.patches)]
    plain = backbone.plain().in_float32()
    by_hooks = patched(plain, sweep, chosen)
    swept = [delta[trial, index].item() for trial, index in chosen]
    gap = max(abs(a - b) for a, b in zip(by_hooks, swept, strict=True))
    size = statistics.median(map(abs, by_hooks))
    said = f"{gap:.1e} (median effect {size:.1e})"
    if not packed:
        return said, ""
    own = backbone.plain()
    vars(own.arithmetic)["_packed"] = ()  # the layers' own forward
    through_package = patched(own, sweep, chosen)
    gaps = [abs(a - b) for a, b in zip(by_hooks, through_package, strict=True)]
    return said, f"{statistics.median(gaps):.1e}, {max(gaps):.1e}"


def patched(backbone: Backbone, sweep: Sweep, chosen: list[tuple[int, int]]) -> list[float]:
    """delta_p of each (trial, head) by one hooked forward pass."""
    deltas = []
    with backbone.running():
        for trial, index in chosen:
            prompt, target, head = sweep.prompts[trial], sweep.targets[trial], sweep.heads[index]
            base = float(naive_baseline(backbone, prompt, target).p)
            p = naive_head_patch(backbone, prompt, target, head, sweep.means[head.layer, head.head]).p
            deltas.append(float(p) - base)
    return deltas


def large(args: argparse.Namespace, shape: dict[str, int]) -> str:
    """The 70B shape in 4 bit, all weights on the card: a table."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    started = time.perf_counter()
    model = packed_model({**shape, "num_hidden_layers": args.layers}, device)
    arch = resolve(model, "llama3")
    made = time.perf_counter() - started
    rows = []
    rng = random.Random(0)
    vocabulary = shape["vocab_size"]
    prompts = [[rng.randrange(vocabulary) for _ in range(rng.randint(65, 85))] for _ in range(25)]
    asked = Prompts(prompts, [rng.randrange(vocabulary) for _ in prompts])
    heads = [HeadId(layer, head) for layer in range(arch.n_layers) for head in range(arch.n_heads)]
    means = 0.1 * torch.randn(arch.n_layers, arch.n_heads, arch.head_dim)
    for precision in PRECISIONS:
        backbone = Backbone(model, arch, device, Arithmetic.with_kernels(model, arch, precision))
        if precision == "exact":
            engine, check = choose_engine(backbone, prompts[:2])
            facts, rounding = engine.backbone.arithmetic.facts(), f"{check.rounding or 0:.1e}"
            print(f"70B shape: made in {made:.0f} s, {engine.name}: {check.reason}; {facts}, rounding {rounding}",
                  flush=True)  # fmt: skip
        SharedPrefixEngine(backbone).sweep_heads(asked[:2], means, heads[:: arch.n_heads])  # kernels are compiled
        sweep = partial(SharedPrefixEngine(backbone).sweep_heads, asked, means, heads)
        found, seconds, gib = timed(device, 1, sweep, warm=False)
        weights = f"{backbone.weights_on_device / 2**30:.1f}"
        name = f"4bit, {arch.n_layers} layers x {arch.n_heads} heads"
        rows.append([name, precision, weights, f"{gib:.1f}", f"{seconds:.1f}", str(found.per_pass)])
        print(rows[-1], flush=True)
    return table("| weights | arithmetic | weights, GiB | peak GiB | sweep, s | trials a pass |", rows)


def packed_model(shape: dict[str, int], device: torch.device) -> Any:
    """A Llama with random weights whose blocks' linear layers bitsandbytes has packed in 4 bit."""
    config = llama_config({**shape, "num_hidden_layers": 1})
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model: Any = transformers.LlamaForCausalLM(config)
            kind = type(model.model.layers[0])
            blocks = [pack(kind(config, layer)) for layer in range(shape["num_hidden_layers"])]
    finally:
        torch.set_default_dtype(torch.float32)
    model.model.layers = torch.nn.ModuleList(blocks)
    config.num_hidden_layers = len(blocks)
    for weight in (model.lm_head.weight, model.model.embed_tokens.weight):
        weight.data.normal_(0, STD)
    model.lm_head.weight.data.mul_(4)
    return model.eval().requires_grad_(False)


def pack(block: torch.nn.Module) -> torch.nn.Module:
    """``block`` with its linear layers drawn anew and packed."""
    from bitsandbytes.nn import Linear4bit, Params4bit  # type: ignore[attr-defined]

    for parent in list(block.modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is torch.nn.Linear:
                weight = linear.weight
                weight.data.normal_(0, STD)
                packed = Linear4bit(
                    linear.in_features, linear.out_features, bias=False, quant_type="nf4", device="meta"
                )
                weights = Params4bit(weight.data, requires_grad=False, quant_type="nf4")  # type: ignore[call-arg]
                packed.weight = weights._quantize(weight.device)
                setattr(parent, name, packed)
    return block


def table(header: str, rows: list[list[str]]) -> str:
    """Markdown."""
    rule = "|" + "---|" * (header.count("|") - 1)
    return "\n".join([header, rule, *(f"| {' | '.join(row)} |" for row in rows), ""])


if __name__ == "__main__":
    main()
