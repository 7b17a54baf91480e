"""Train the demo model (recipe.py) and save it as a folder that ``from_pretrained`` opens without a network."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as hf_logging

from relfv.demo.documents import IGNORED, DocumentSampler, build_tokenizer, collate, read_relations
from relfv.demo.recipe import DemoTrainingConfig
from relfv.demo.validation import validate
from relfv.errors import InputError
from relfv.models.devices import choose_device


@dataclass(frozen=True)
class TrainingResult:
    """The outcome of a finished training."""

    path: Path
    """The folder with config.json, model.safetensors and the tokenizer's files."""
    parameters: int
    """Number of parameters, the tied embedding counted once."""
    steps: int
    """Optimiser steps taken."""
    seconds: float
    """Duration of the training loop."""
    log: list[dict[str, float]] = field(repr=False)
    """One dict every ``log_every`` steps: step, loss, and accuracy and P on the three kinds of validation prompt."""


def train_demo_model(
    out_dir: str | Path,
    *,
    csv_path: str | Path,
    seed: int = 0,
    steps: int | None = None,
    device: str = "auto",
    threads: int = 1,
    config: DemoTrainingConfig | None = None,
    log_path: str | Path | None = None,
    log: Callable[[str], None] = print,
) -> TrainingResult:
    """Train a demo model on the pairs of ``csv_path`` and save it in ``out_dir``, which appears whole or not at all.

    ``steps`` overrides the number of steps of ``config``; ``device`` is ``auto``, ``cpu``, ``cuda``, ... The training
    log goes to ``log_path`` (JSON lines) if that is given. The same CSV, config, seed, library versions and machine
    give the same weights.

    ``threads`` is the number of CPU threads. The matrices are so small that a second one saves only a quarter of the
    time, and it splits sums differently: with one thread the weights do not depend on the number of cores.

    Raises InputError if ``out_dir`` already holds something, ``log_path`` cannot be written, the CSV cannot be read, or
    none of its relations is large enough to train on.
    """
    _require_free(Path(out_dir))
    if log_path is not None:
        _require_writable(Path(log_path))
    config = config or DemoTrainingConfig()
    if steps is not None:
        config = dataclasses.replace(config, steps=steps)
    if config.steps < 1:
        raise ValueError(f"steps must be at least 1, got {config.steps}")
    where = choose_device(device)
    relations = read_relations(csv_path)
    tokenizer = build_tokenizer(relations, in_pieces=config.in_pieces)
    sampler = DocumentSampler(relations, tokenizer, config)
    model: Any = build_model(tokenizer, config, seed=seed)
    model.to(where)
    parameters = sum(p.numel() for p in model.parameters())
    log(
        f"{sum(map(len, relations.values()))} pairs of {len(relations)} relations, "
        f"{len(sampler.relations)} of them trained on; {parameters:,} parameters, {len(tokenizer)} tokens, "
        f"{config.steps} steps on {where}"
    )
    started = time.monotonic()
    with _cpu_threads(threads):
        lines = _optimise(model, sampler, config, seed=seed, log=log)
    seconds = time.monotonic() - started
    path = _save(model.cpu(), tokenizer, Path(out_dir))
    if log_path is not None:
        Path(log_path).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    log(f"saved {path} after {seconds:.0f} s")
    return TrainingResult(path, parameters, config.steps, seconds, lines)


def build_model(tokenizer: PreTrainedTokenizerFast, config: DemoTrainingConfig, *, seed: int) -> LlamaForCausalLM:
    """An untrained Llama with tied embeddings; the seed fixes its weights."""
    special: Any = tokenizer
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden,
        intermediate_size=config.intermediate,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=1024,
        initializer_range=config.initializer_range,
        tie_word_embeddings=True,
        bos_token_id=special.bos_token_id,
        eos_token_id=special.eos_token_id,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):  # leaves the caller's random state as it was
        torch.manual_seed(seed)
        return LlamaForCausalLM(shape).float()


def head_norms(model: LlamaForCausalLM, config: DemoTrainingConfig) -> torch.Tensor:
    """Frobenius norm of each head's slice of the output projection, (layer, head)."""
    blocks: Any = model.model.layers
    weights = torch.stack([block.self_attn.o_proj.weight for block in blocks])
    slices = weights.view(config.layers, config.hidden, config.heads, config.head_dim)
    return slices.square().sum(dim=(1, 3)).add(1e-12).sqrt()


def _optimise(
    model: LlamaForCausalLM,
    sampler: DocumentSampler,
    config: DemoTrainingConfig,
    *,
    seed: int,
    log: Callable[[str], None],
) -> list[dict[str, float]]:
    """Train ``model`` in place; returns the lines of the log."""
    device = model.device
    rng = random.Random(f"demo-training:{seed}")
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=config.betas,
        fused=True,
    )
    lines: list[dict[str, float]] = []
    started = time.monotonic()
    running, since = torch.zeros((), device=device), 0
    model.train()
    for step in range(1, config.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * _rate_share(step, config)
        documents = [sampler.document(rng) for _ in range(config.batch)]
        ids, labels = collate(documents, device)
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        answering = labels != IGNORED
        logits = model.lm_head(hidden[answering])  # only where there is a target: (target, vocabulary)
        loss = torch.nn.functional.cross_entropy(logits, labels[answering])
        penalty = config.head_lasso * head_norms(model, config).sum()
        optimizer.zero_grad(set_to_none=True)
        (loss + penalty).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        running += loss.detach()
        since += 1
        if step % config.log_every == 0 or step == config.steps:
            elapsed = time.monotonic() - started
            line = {"step": step, "loss": float(running) / since, **validate(model, sampler, seed=seed)}
            lines.append({key: round(value, 4) for key, value in line.items()})
            running.zero_()
            since = 0
            log(
                f"step {step}/{config.steps}  loss {line['loss']:.3f}  clean acc {line['clean_acc']:.2f} "
                f"P {line['clean_p']:.2f}  shuffled P {line['shuffled_p']:.2f}  "
                f"zero-shot P {line['zeroshot_p']:.2f}  {elapsed / step * (config.steps - step):.0f} s left"
            )
    model.eval()
    return lines


@contextlib.contextmanager
def _cpu_threads(threads: int) -> Iterator[None]:
    """While open, torch computes with this number of CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _rate_share(step: int, config: DemoTrainingConfig) -> float:
    """Learning rate as a share of its peak: linear warm-up, then linear decay to ``final_rate``."""
    if step <= config.warmup:
        return step / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return 1.0 - (1.0 - config.final_rate) * done


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out_dir: Path) -> Path:
    """Write model and tokenizer into a folder beside ``out_dir``, then rename it."""
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    partial = out_dir.with_name(f".{out_dir.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    hf_logging.disable_progress_bar()
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    for file in partial.iterdir():
        file.chmod(0o644)  # safetensors writes 0600, which only the user who installed the package could read
    return partial.rename(out_dir)


def _require_free(out_dir: Path) -> None:
    """Raise InputError for a place that holds something."""
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise InputError(f"{out_dir}: already there and not empty; expected a new folder for the model")


def _require_writable(log_path: Path) -> None:
    """Raise InputError for a log that could not be written once the training is over. What is there is kept."""
    there = log_path.exists()
    try:
        os.close(os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK, 0o666))  # do not wait for a pipe's reader
    except OSError as problem:
        raise InputError(
            f"--log_path {log_path}: cannot be written ({problem.strerror}); expected a file in a folder that is there"
        ) from None
    if not there:
        log_path.unlink()
