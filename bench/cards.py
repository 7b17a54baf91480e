"""Several cards: one model spread over two, and two processes that share the q_ids of one run.

    python bench/cards.py                    # on two GPUs of 80 GB: a few minutes
    python bench/cards.py --work /dev/shm    # beside it 8 q_ids of an 8B shape, by one process and by two
    python bench/cards.py --tiny             # on any two GPUs, to see that it works

Weights are random, seeded by layer, and made on the cards: the model over two cards has those of the model on one, and
its scores must be the same bits at the same trials a pass. Each row is a head sweep over 25 trials; "ratio" is one
card's best time by this row's.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from one_card import COLUMNS, row
from relfv.engine.arithmetic import Arithmetic
from relfv.engine.base import Backbone
from relfv.engine.passes import capture_heads
from relfv.engine.shared_prefix import SharedPrefixEngine
from relfv.models.architecture import resolve
from relfv.models.cards import cards_bytes, shares_of_cards, spread, vocabulary_in_blocks
from relfv.models.placement import bytes_of_prompt, sizes_of
from relfv.types import Effects
from shapes import llama_config
from streaming import SMALLER, STD, TINY, WIDE, asked, size, write_checkpoint

ONE, TWO = [torch.device("cuda", 0)], [torch.device("cuda", 0), torch.device("cuda", 1)]


def main() -> None:
    """Parse, run, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="shapes for any card")
    parser.add_argument("--layers", type=int, default=36, help="of the large shape that one card holds, too")
    parser.add_argument("--no_full", action="store_true", help="leave out the large shape at full depth")
    parser.add_argument("--work", type=Path, default=None, help="where a checkpoint of 16 GB goes, for whole runs")
    parser.add_argument("--q_ids", type=int, default=8)
    args = parser.parse_args()
    print(f"{torch.cuda.get_device_name(0)} x {torch.cuda.device_count()}, torch {torch.__version__}, transformers "
          f"{transformers.__version__}", flush=True)  # fmt: skip
    small, large = (TINY, TINY) if args.tiny else (SMALLER, WIDE)
    rows = compared(small, [25, 9, 7, 5, 4, 3])
    rows += compared({**large, "num_hidden_layers": args.layers}, [7, 4, 3, 2, 1])
    if not args.no_full:
        backbone = built(large, TWO)
        rows += [swept(backbone, large, per_pass)[0] for per_pass in (None, 2)]
        del backbone
        gc.collect()
        torch.cuda.empty_cache()
    print("\n| model | on | arithmetic | trials a pass | sweep, s | ratio | bits as on one card | peak GiB of each |")
    print("|---|---|---|---|---|---|---|---|")
    print("\n".join(f"| {' | '.join(row)} |" for row in rows), flush=True)
    if args.work:
        whole_runs(TINY if args.tiny else SMALLER, args.work, args.q_ids)


def compared(shape: dict[str, int], passes: list[int]) -> list[list[str]]:
    """On one card and over two, with so many trials a pass each."""
    rows, on_one, best = [], dict[int, Effects](), float("inf")
    for devices in (ONE, TWO):
        backbone = built(shape, devices)
        for per_pass in passes:
            row, seconds, effects = swept(backbone, shape, per_pass)
            if devices is ONE:
                on_one[per_pass], best = effects, min(best, seconds)
            else:
                row[5] = f"{best / seconds:.2f}"
                same = torch.equal(effects.edited.logprob, on_one[per_pass].edited.logprob)
                row[6] = "yes" if same else "no"
            rows.append(row)
        del backbone
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def built(shape: dict[str, int], devices: list[torch.device]) -> Backbone:
    """The model of this shape, on these devices."""
    config = llama_config(shape)
    with torch.device("meta"):
        model: Any = transformers.LlamaForCausalLM(config).to(torch.bfloat16)  # type: ignore[arg-type]
    model = model.eval().requires_grad_(False)
    arch = resolve(model, "llama3")
    one = bytes_of_prompt(arch, arch.n_heads * arch.n_layers)
    sizes = sizes_of(model, arch, None, converted=False)
    counts = shares_of_cards(size(shape), sizes, cards_bytes(devices, arch), one, vocabulary_in_blocks(arch))
    where = [device for device, count in zip(devices, counts, strict=True) for _ in range(count)]
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    give_weights(model.model.embed_tokens, devices[0], 1000)
    for layer, block in enumerate(arch.blocks):
        give_weights(block, where[layer], layer)
    give_weights(model.model.norm, devices[-1], 1001)
    give_weights(model.lm_head, devices[-1], 1002)
    model.lm_head.weight.mul_(4)
    cards = spread(model, arch, counts, devices)
    print(f"{size(shape)}: {cards}", flush=True)
    arithmetic = Arithmetic.with_kernels(model, arch, "exact")
    return Backbone(model, arch, devices[0], arithmetic, cards=cards if len(devices) > 1 else None)


def give_weights(module: torch.nn.Module, device: torch.device, seed: int) -> None:
    """The same numbers on any card."""
    generator = torch.Generator(device).manual_seed(seed)
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            new = torch.ones(parameter.shape, dtype=torch.bfloat16, device=device)
            if parameter.dim() > 1:
                new.normal_(0, STD, generator=generator)
            part._parameters[name] = torch.nn.Parameter(new, requires_grad=False)


def swept(backbone: Backbone, shape: dict[str, int], per_pass: int | None) -> tuple[list[str], float, Effects]:
    """A row of the table, the median of seconds, and the effects."""
    prompts, heads = asked(backbone.arch, shape)
    with backbone.running():
        means = capture_heads(backbone, prompts.ids[:4])[0].mean(0)
    SharedPrefixEngine(backbone).sweep_heads(prompts[:2], means, heads)  # kernels are compiled
    seconds: list[float] = []
    for device in TWO:
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(3 if shape["hidden_size"] < WIDE["hidden_size"] else 1):
        torch.cuda.synchronize()
        started = time.perf_counter()
        effects = SharedPrefixEngine(backbone).sweep_heads(prompts, means, heads, per_pass=per_pass)
        seconds.append(time.perf_counter() - started)
    peaks = [torch.cuda.max_memory_allocated(d) / 2**30 for d in (TWO if backbone.cards else ONE)]
    median, on = statistics.median(seconds), str(backbone.cards) if backbone.cards else "one card"
    row = [size(shape), on, backbone.arithmetic.precision, str(effects.per_pass), f"{median:.3f}", "", "",
           ", ".join(f"{peak:.1f}" for peak in peaks)]  # fmt: skip
    print(f"    {row[3]} trials a pass: {row[4]} s", flush=True)
    return row, median, effects


def whole_runs(shape: dict[str, int], work: Path, n_q_ids: int) -> None:
    """A checkpoint of this shape, and q_ids with all their files: by one process, and by two on a card each."""
    rows = [f"Q{q},{a}{q}x{i},{a}{i}\n" for q in range(n_q_ids) for i in range(30) for a in ("word",)]
    with tempfile.TemporaryDirectory(dir=work) as folder:
        model, csv = Path(folder, "model"), Path(folder, "pairs.csv")
        model.mkdir()
        csv.write_text("id,ex_A,ex_B\n" + "".join(rows))
        write_checkpoint(model, shape, ONE[0])
        columns = [f"{n_q_ids} q_ids of {size(shape)}", *COLUMNS[2:]]
        print(f"\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)
        first: dict[str, str] = {}
        for n, flags in ((1, ["--device", "cuda:0"]), (2, ["--devices", "cuda:0,cuda:1"])):
            given = ["--model", str(model), "--relation_csv_path", str(csv), *flags]
            print(f"| {' '.join(flags)} | {row(Path(folder, flags[1]), n, given, first)} |", flush=True)


if __name__ == "__main__":
    main()
