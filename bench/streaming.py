"""A model larger than the card: the head sweep of a 70B shape at full depth on one GPU, its blocks streaming.

    python bench/streaming.py                 # on one GPU of 80 GB with 128 GiB of host memory: a few minutes
    python bench/streaming.py --disk 30       # beside it, a checkpoint of 30 such layers streamed from its files
    python bench/streaming.py --tiny          # on any machine, to see that it works

Weights are random, seeded, bf16, and made in host memory: no disk of the machine holds them. Where blocks go is what
``--offload auto`` decides; where host memory cannot hold all that stream, several layers share one copy of weights,
which is said: each layer is copied to the card all the same. Beside it, in the same process, an 8B shape with all
weights on the card and with all blocks streaming: what streaming costs a model that would not need it.

TFLOP/s count the products of the sweep once, whatever they are computed with. GB/s are bytes that went to the card by
the sweep's seconds.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from relfv.engine.arithmetic import Arithmetic
from relfv.engine.base import Backbone
from relfv.engine.passes import capture_heads
from relfv.engine.shared_prefix import SharedPrefixEngine
from relfv.models.architecture import Architecture, resolve
from relfv.models.memory import available_bytes
from relfv.models.opening import load_checkpoint
from relfv.models.placement import (
    N_TRIALS,
    PROMPTS_A_PASS,
    Placement,
    bytes_of_prompt,
    bytes_waiting,
    card_bytes,
    plan,
    sizes_of,
)
from relfv.models.sources import model_source
from relfv.models.streaming import Streaming, _Block, stream
from relfv.types import HeadId, Prompts
from shapes import llama_config

WIDE = {
    "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 8192,
}  # fmt: skip
SMALLER = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
}  # fmt: skip
TINY = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
STD = 0.012
"""Of the weights: a product of width 8192 then keeps its input's size. With more, 80 random layers amplify rounding
until two ways in float32 differ by as much as the self-check accepts."""


def main() -> None:
    """Parse, run, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="shapes for any machine, on the CPU if there is no GPU")
    parser.add_argument("--layers", type=int, default=None, help="of the large shape, if not all 80")
    parser.add_argument("--all_stream", action="store_true", help="no block of the large shape stays on the card")
    parser.add_argument(
        "--room",
        type=int,
        default=PROMPTS_A_PASS,
        help="trials that its passes get room for; with fewer, more layers stay",
    )
    parser.add_argument("--disk", type=int, default=0, help="layers of a checkpoint of the large shape's widths")
    parser.add_argument("--work", type=Path, default=None, help="where that checkpoint is written")
    parser.add_argument("--repeats", type=int, default=1, help="timed sweeps of the large shape")
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    if not cuda and not args.tiny:
        parser.error("needs a GPU; --tiny runs anywhere")
    large = {**(TINY if args.tiny else WIDE), **({"num_hidden_layers": args.layers} if args.layers else {})}
    small = TINY if args.tiny else SMALLER
    name = torch.cuda.get_device_name(device) if cuda else "CPU"
    print(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}; host memory free: "
          f"{(available_bytes() or 0) / 1e9:.0f} GB", flush=True)  # fmt: skip
    rows = [*compared(small, device), *streamed(args, large, device)]
    gc.collect()
    if args.disk:
        rows += from_disk(args, {**large, "num_hidden_layers": args.disk}, device)
    print("\n| model | arithmetic | blocks | sweep, s | TFLOP/s | peak GiB | trials a pass | GB streamed | GB/s |")
    print("|---|---|---|---|---|---|---|---|---|")
    print("\n".join(f"| {' | '.join(row)} |" for row in rows))


def compared(shape: dict[str, int], device: torch.device) -> list[list[str]]:
    """The smaller shape resident and streamed: rows, with the ratio."""
    rows, seconds = [], {}
    for offload in ("none", "cpu"):
        backbone, placement = built(shape, device, offload)
        for precision in ("exact", "fast"):
            row, seconds[offload, precision] = swept(backbone, shape, precision, where(placement), repeats=3)
            rows.append(row)
        del backbone
        gc.collect()  # hooks and modules refer to each other
    for precision in ("exact", "fast"):
        ratio = seconds["cpu", precision] / seconds["none", precision]
        print(f"{size(shape)} {precision}: streamed / resident = {ratio:.3f}", flush=True)
    return rows


def streamed(args: argparse.Namespace, shape: dict[str, int], device: torch.device) -> list[list[str]]:
    """The large shape, in both precisions."""
    offload = "cpu" if args.all_stream or device.type != "cuda" else "auto"
    backbone, placement = built(shape, device, offload, args.room)
    return [swept(backbone, shape, precision, where(placement), args.repeats)[0] for precision in ("exact", "fast")]


def built(
    shape: dict[str, int], device: torch.device, offload: str, room: int = PROMPTS_A_PASS
) -> tuple[Backbone, Placement]:
    """The model of this shape with random weights where ``offload`` puts them."""
    started = time.perf_counter()
    config = llama_config(shape)
    with torch.device("meta"):
        model: Any = transformers.LlamaForCausalLM(config).to(torch.bfloat16)  # type: ignore[arg-type]
    model = model.eval().requires_grad_(False)
    arch = resolve(model, "llama3")
    sizes = sizes_of(model, arch, None, converted=False)
    n_heads, card = arch.n_heads * arch.n_layers, card_bytes(device, arch)
    one, waiting = bytes_of_prompt(arch, n_heads), bytes_waiting(arch, n_heads)
    placement = plan(size(shape), offload, sizes, card=card, one_prompt=one, waiting=waiting, host=None, prompts=room)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    torch.manual_seed(0)
    noise = random_numbers(max(sizes.blocks) // 2 + (1 << 20), device)
    give_weights(model, arch, noise, device, {*placement.host})
    given = time.perf_counter()
    free = available_bytes(to_share=True)
    distinct = len(placement.host)
    if free is not None and placement.host_bytes > 0.9 * free:
        distinct = int(0.9 * free // max(sizes.blocks))
        print(f"NOTE: host memory holds {distinct} of the {len(placement.host)} layers that stream; the others use "
              "these layers' weights again, each copied to the card in its turn", flush=True)  # fmt: skip
    streaming = sharing(model, arch, placement, device, distinct) if placement.streams else None
    if streaming is None:
        model.to(device)
    print(f"{size(shape)}: {placement}; weights drawn in {given - started:.1f} s, in their places (copied and "
          f"page-locked) after {time.perf_counter() - given:.1f} s more", flush=True)  # fmt: skip
    started = time.perf_counter()
    arithmetic = Arithmetic.with_kernels(model, arch, "exact")
    print(f"    kernels recognised in {time.perf_counter() - started:.1f} s", flush=True)
    return Backbone(model, arch, device, arithmetic, streaming), placement


def random_numbers(n: int, device: torch.device) -> torch.Tensor:
    """bf16 (n,) on the CPU, from N(0, STD**2)."""
    numbers = torch.empty(n, dtype=torch.bfloat16)
    for part in numbers.split(1 << 28):
        part.copy_(torch.empty(len(part), dtype=torch.bfloat16, device=device).normal_(0, STD))
    return numbers


def give_weights(model: Any, arch: Any, noise: torch.Tensor, device: torch.device, apart: set[int]) -> None:
    """Replace meta tensors: in the layers ``apart`` by views of ``noise`` that begin elsewhere in each layer, without
    memory of their own until they are copied, in the others and outside the layers by new tensors on the device."""
    inside = {id(p): layer for layer, block in enumerate(arch.blocks) for p in block.parameters()}
    begun = dict.fromkeys(range(arch.n_layers), 0)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            layer = inside.get(id(parameter))
            if parameter.dim() == 1:
                new = torch.ones(parameter.shape, dtype=torch.bfloat16, device="cpu" if layer in apart else device)
            elif layer in apart:
                start = begun[layer] + 997 * layer * 8
                new = noise[start : start + parameter.numel()].view(parameter.shape)
                begun[layer] += parameter.numel()
            else:
                new = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device).normal_(0, STD)
            module._parameters[name] = torch.nn.Parameter(new, requires_grad=False)
    model.lm_head.weight.mul_(4)


def sharing(model: Any, arch: Any, placement: Placement, device: torch.device, distinct: int) -> Streaming:
    """``stream``, in whose host memory the first ``distinct`` layers' weights serve the others as well."""
    if distinct >= len(placement.host):
        return stream(model, arch, placement, device)
    model.model.rotary_emb.to(device)
    blocks: list[_Block] = []
    for i, layer in enumerate(placement.host):
        parameters = [*arch.blocks[layer].parameters()]
        if i < distinct:
            blocks.append(_Block.of(parameters))
            blocks[i].keep(None, device)
        else:
            blocks.append(replace(blocks[i % distinct], parameters=parameters))
            blocks[i].become(blocks[i].at_rest)
    return Streaming([arch.blocks[layer] for layer in placement.host], blocks, placement, device)


def swept(
    backbone: Backbone, shape: dict[str, int], precision: Any, blocks: str, repeats: int
) -> tuple[list[str], float]:
    """A row of the table, and the median of seconds."""
    backbone = replace(backbone, arithmetic=replace(backbone.arithmetic, precision=precision))
    prompts, heads = asked(backbone.arch, shape)
    with backbone.running():
        means = capture_heads(backbone, prompts.ids)[0].mean(0)
    engine = SharedPrefixEngine(backbone)
    engine.sweep_heads(prompts[:2], means, heads[:: backbone.arch.n_heads])  # kernels are compiled
    seconds, gigabytes, peak, per_pass = [], [], 0.0, 0
    for _ in range(repeats):
        engine = SharedPrefixEngine(backbone)
        with timed(backbone.device, seconds), counted(backbone.streaming, gigabytes):
            effects = engine.sweep_heads(prompts, means, heads)
        assert torch.isfinite(effects.edited.logprob).all()
        per_pass = effects.per_pass or 0
    if backbone.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
    typical, moved = statistics.median(seconds), statistics.median(gigabytes)
    print(f"    {size(shape)} {precision}: {', '.join(f'{s:.2f}' for s in seconds)} s", flush=True)
    numbers = [f"{typical:.2f}", f"{flops(shape) / typical / 1e12:.0f}", f"{peak:.1f}", str(per_pass), f"{moved:.0f}",
               f"{moved / typical:.1f}"]  # fmt: skip
    return [size(shape), precision, blocks, *numbers], typical


def asked(arch: Architecture, shape: dict[str, int]) -> tuple[Prompts, list[HeadId]]:
    """25 random prompts with a target each, the same ones each time, and all heads."""
    rng = random.Random(0)
    ids = [[rng.randrange(shape["vocab_size"]) for _ in range(rng.randint(65, 85))] for _ in range(N_TRIALS)]
    prompts = Prompts(ids, [rng.randrange(shape["vocab_size"]) for _ in ids])
    return prompts, [HeadId(layer, head) for layer in range(arch.n_layers) for head in range(arch.n_heads)]


@contextmanager
def timed(device: torch.device, into: list[float]) -> Iterator[None]:
    """Seconds of what is done while open."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    started = time.perf_counter()
    yield
    if device.type == "cuda":
        torch.cuda.synchronize()
    into.append(time.perf_counter() - started)


@contextmanager
def counted(streaming: Streaming | None, into: list[float]) -> Iterator[None]:
    """Gigabytes streamed while open."""
    before = streaming.bytes_streamed if streaming else 0
    yield
    into.append(((streaming.bytes_streamed if streaming else 0) - before) / 1e9)


def from_disk(args: argparse.Namespace, shape: dict[str, int], device: torch.device) -> list[list[str]]:
    """A checkpoint of this shape, written, dropped from the page cache, opened and swept from its files."""
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        started = time.perf_counter()
        n_bytes = write_checkpoint(Path(folder), shape, device)
        print(f"{size(shape)}: checkpoint of {n_bytes / 1e9:.0f} GB written in {time.perf_counter() - started:.0f} s",
              flush=True)  # fmt: skip
        started = time.perf_counter()
        opened = load_checkpoint(
            folder, "llama3", revision="", device=str(device), dtype="auto", quant="none", offload="disk", exact=True,
            trust_remote_code=False,
        )  # fmt: skip
        print(f"    opened in {time.perf_counter() - started:.1f} s", flush=True)
        arithmetic = Arithmetic.with_kernels(opened.model, opened.arch, "exact")
        backbone = Backbone(opened.model, opened.arch, device, arithmetic, opened.streaming)
        assert opened.streaming
        return [swept(backbone, shape, "exact", where(opened.streaming.placement), args.repeats)[0]]


def write_checkpoint(folder: Path, shape: dict[str, int], device: torch.device) -> int:
    """A file a layer and one for the rest, in the layout of Hugging Face models. -> bytes."""
    config = llama_config(shape)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    files: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        files.setdefault(f"layer-{parts[2]}" if parts[1] == "layers" else "rest", {})[name] = parameter
    where_is = {}
    for file, tensors in files.items():
        path = folder / f"{file}.safetensors"
        new = lambda p: torch.empty(p.shape, dtype=torch.bfloat16, device=device)  # noqa: E731
        save_file({n: new(p).normal_(0, STD) if p.dim() > 1 else new(p).fill_(1) for n, p in tensors.items()}, path)
        where_is |= dict.fromkeys(tensors, path.name)
        with path.open("rb") as written:  # read from the disk, not from memory
            os.fsync(written.fileno())
            os.posix_fadvise(written.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where_is}))
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(model_source("demo")).save_pretrained(folder)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def flops(shape: dict[str, int]) -> float:
    """Of the sweep's linear layers: after layer l a trial has 1 + H (l + 1) copies of its last token."""
    d, mlp, n_heads, n_layers = (
        shape[k] for k in ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
    )
    kv = d // n_heads * shape["num_key_value_heads"]
    of_block = 2 * d * d + 2 * d * kv + 3 * d * mlp
    rows = sum(1 + n_heads * (layer + 1) for layer in range(n_layers))
    return 2.0 * N_TRIALS * (rows * of_block + (1 + n_heads * n_layers) * d * shape["vocab_size"])


def size(shape: dict[str, int]) -> str:
    """``80 x 64 heads, width 8192``."""
    return f"{shape['num_hidden_layers']} x {shape['num_attention_heads']} heads, width {shape['hidden_size']}"


def where(placement: Placement) -> str:
    """``18 on the card, 62 streamed``."""
    parts = {"on the card": placement.resident, "from host": placement.host, "from files": placement.disk}
    return ", ".join(f"{len(layers)} {name}" for name, layers in parts.items() if layers)


if __name__ == "__main__":
    main()
