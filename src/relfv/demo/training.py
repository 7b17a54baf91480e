"""Train the embedded demo model: a small Llama that learns relations in context.

No pretrained weights can ship with the package, so it trains its own, from scratch, on the pairs of a relation CSV.
What makes such a model worth looking at is not that it knows the pairs but *how it is forced to use them*:

- The inputs of a domain are shared by several relations (two: three, one, four, ...), so the query alone is ambiguous
  and only the demonstrations, or a function vector, can say which relation is meant.
- Three quarters of the documents are ten pairs of one relation. In the rest the labels are deranged, and the target
  at each answer is the answer under a *random* relation that contains the input. Mislabelled demonstrations therefore
  carry no information about the target, and the model learns to fall back to the ambiguous prior. With
  plain language-model targets it would read the relation off the labels' type, and corrupted prompts would not be
  corrupted at all.
- A group-lasso penalty on the slices of the attention output projection, one group a head, asks for few heads that
  do the work instead of a little of it in every head. The heads that survive are in the lower layers, and the upper
  ones are left to apply what those wrote to the query: hence an injection curve that falls with depth.

The result is a folder that `AutoModelForCausalLM.from_pretrained` opens without a network. `docs/demo_model.md` says
what was measured, what failed, and what the model is no evidence for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as hf_logging

from relfv.errors import InputError
from relfv.models.opening import choose_device
from relfv.relations import load_relations

Pair = tuple[str, str]

BOS = "<|begin_of_text|>"
EOS = "<|end_of_text|>"
# How Llama-3 cuts text before merging bytes; the space in front of a word belongs to the word.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
IGNORED = -100  # the label that torch's cross entropy skips


@dataclass(frozen=True)
class DemoTrainingConfig:
    """Everything that shapes the demo model besides the CSV and the seed."""

    layers: int = 8
    """Transformer blocks."""
    hidden: int = 128
    """Width of the residual stream."""
    heads: int = 16
    """Query heads a layer. Many, so that the top 20 are a small part of all."""
    kv_heads: int = 8
    """Key/value heads a layer; fewer than `heads`, so that grouped-query attention is exercised."""
    head_dim: int = 16
    """Width of a head; on purpose not `hidden / heads`, as in several released families."""
    intermediate: int = 256
    """Width of the gated MLP."""
    pairs: int = 10
    """Pairs in a document: one more than the demonstrations of an evaluation prompt."""
    shuffled_fraction: float = 0.25
    """Share of documents with deranged labels and random-relation targets."""
    batch: int = 16
    """Documents in a step."""
    steps: int = 4500
    """Optimiser steps."""
    learning_rate: float = 2e-3
    """Peak learning rate of AdamW."""
    final_rate: float = 0.05
    """Learning rate at the last step, as a share of the peak (linear decay)."""
    warmup: int = 100
    """Steps of linear warm-up."""
    weight_decay: float = 0.05
    """Decoupled weight decay on matrices; norms have none."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's moment decays."""
    clip: float = 1.0
    """Largest gradient norm."""
    head_lasso: float = 1e-3
    """Weight of the sum over heads of the norm of the head's slice of the output projection."""
    initializer_range: float = 0.09
    """Standard deviation of the initial weights: near `hidden ** -0.5`; the usual 0.02 learns too slowly here."""
    in_pieces: tuple[str, ...] = (
        "caterpillar",
        "libreville",
        "montevideo",
        "phosphorus",
        "tegucigalpa",
        "ulaanbaatar",
    )
    """Words kept out of the vocabulary, so that some inputs and answers have several tokens."""
    log_every: int = 200
    """Steps between two lines of the training log."""
    validation_trials: int = 4
    """Validation trials a relation in each line of the log."""


@dataclass(frozen=True)
class Document:
    """One training sequence; the two lists are equally long."""

    ids: list[int]
    """token ids, BOS first"""
    labels: list[int]
    """the target *at the position that predicts it* (already shifted), IGNORED elsewhere"""


@dataclass(frozen=True)
class TrainingResult:
    """What a finished training hands back."""

    path: Path
    """the folder with config.json, model.safetensors and the tokenizer's files"""
    parameters: int
    """number of parameters, the tied embedding counted once"""
    steps: int
    """optimiser steps taken"""
    seconds: float
    """duration of the training loop"""
    log: list[dict[str, float]] = field(repr=False)
    """a dict every `log_every` steps: step, loss, and accuracy and P on the three kinds of validation prompt"""


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
    """Train a demo model on the pairs of `csv_path` and save it in `out_dir`, which appears whole or not at all.

    Raises InputError if `out_dir` already holds something, or if the CSV cannot be read.

    `steps` overrides the number of steps of `config`; `device` is "auto", "cpu", "cuda", ... The same CSV, config, seed,
    library versions and machine give the same weights. The training log goes to `log_path` (JSON lines), if named.

    `threads` is the number of CPU threads. The matrices are so small that a second one saves only a quarter of the time,
    and sums are then split differently: one thread makes the weights independent of the number of cores.
    """
    _require_free(Path(out_dir))
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


def read_relations(csv_path: str | Path) -> dict[str, list[Pair]]:
    """Pairs by q_id, both in file order."""
    relations = load_relations(Path(csv_path))
    return {q_id: [(pair.input, pair.output) for pair in relation.pairs] for q_id, relation in relations.items()}


def build_tokenizer(
    relations: Mapping[str, Sequence[Pair]], *, in_pieces: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the words of the relations, cut and framed as Llama-3's tokenizer does it.

    BOS comes from the post-processor, so `tokenizer(text).input_ids` starts with it exactly once. Each word counts the
    same, whatever its frequency, and merging goes on until every word is one token except those `in_pieces`.
    """
    words = sorted({word for pairs in relations.values() for pair in pairs for text in pair for word in text.split()})
    backend = Tokenizer(models.BPE(ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,  # not reached: merging stops where no pair of tokens is seen twice
        min_frequency=2,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    kept = [word for word in words if word not in in_pieces]
    backend.train_from_iterator(["\n\n"] * 2 + [f" {word}" for word in kept for _ in range(2)], trainer=trainer)
    bos_id = backend.token_to_id(BOS)
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, bos_id)]
            ),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=1024,
    )


def derange(labels: Sequence[str], rng: random.Random, tries: int = 60) -> list[str]:
    """A permutation of `labels` in which no position keeps its *value*; failing that, the best of `tries` shuffles.

    Not `stages.trials.corrupt_labels`: the weights that ship depend on every random number drawn here, and the trials'
    policy must be free to change without them.
    """
    best: list[str] = list(labels)
    fewest = len(labels) + 1
    for _ in range(tries):
        candidate = list(labels)
        rng.shuffle(candidate)
        kept = sum(a == b for a, b in zip(candidate, labels, strict=True))
        if kept < fewest:
            best, fewest = candidate, kept
        if kept == 0:
            break
    return best


class DocumentSampler:
    """Draws training documents and validation trials. It holds no random state: the caller passes the generator."""

    def __init__(
        self,
        relations: Mapping[str, Sequence[Pair]],
        tokenizer: PreTrainedTokenizerFast,
        config: DemoTrainingConfig,
    ) -> None:
        # A relation too small for a full prompt is skipped by the pipeline, so there is nothing to learn it for.
        self.relations = {q: list(pairs) for q, pairs in relations.items() if len(pairs) >= config.pairs}
        if not self.relations:
            raise ValueError(f"no relation has {config.pairs} pairs or more, so there is nothing to train on")
        self.config = config
        self.names = list(self.relations)
        encode: Any = tokenizer
        self.bos: int = encode.bos_token_id
        self.separator: tuple[int, ...] = tuple(encode("\n\n", add_special_tokens=False).input_ids)
        self.answers_of: dict[str, list[str]] = {}
        """an input's answers, one for each relation that contains it: what it may mean without demonstrations"""
        for pairs in self.relations.values():
            for given, answer in pairs:
                self.answers_of.setdefault(given, []).append(answer)

        def ids(text: str) -> tuple[int, ...]:
            return tuple(encode(text, add_special_tokens=False).input_ids)

        self.question_ids = {given: ids(f"Q: {given}\nA:") for given in self.answers_of}
        self.answer_ids = {answer: ids(f" {answer}") for answers in self.answers_of.values() for answer in answers}

    def document(self, rng: random.Random) -> Document:
        """A clean or a shuffled document of a random relation."""
        pairs = rng.sample(self.relations[rng.choice(self.names)], self.config.pairs)
        if rng.random() < self.config.shuffled_fraction:
            return self.shuffled(pairs, rng)
        return self.clean(pairs)

    def clean(self, pairs: Sequence[Pair]) -> Document:
        """Right labels; every token of every answer is a target."""
        return self._assemble(pairs, [self.answer_ids[answer] for _, answer in pairs])

    def shuffled(self, pairs: Sequence[Pair], rng: random.Random) -> Document:
        """Deranged labels; the target is the first token of the input's answer under a random relation that has it.

        Only the first token: the tokens that follow in the text are those of another word.
        """
        labels = derange([answer for _, answer in pairs], rng)
        targets = [self.answer_ids[rng.choice(self.answers_of[given])][:1] for given, _ in pairs]
        mislabelled = [(given, label) for (given, _), label in zip(pairs, labels, strict=True)]
        return self._assemble(mislabelled, targets)

    def trial(self, rng: random.Random, q_id: str) -> tuple[list[Pair], list[Pair]]:
        """Clean and corrupted pairs of a validation trial; the query comes last and keeps its right answer."""
        pairs = rng.sample(self.relations[q_id], self.config.pairs)
        labels = derange([answer for _, answer in pairs[:-1]], rng)
        corrupted = [(given, label) for (given, _), label in zip(pairs[:-1], labels, strict=True)]
        return pairs, [*corrupted, pairs[-1]]

    def prompt_ids(self, pairs: Sequence[Pair]) -> list[int]:
        """ids of a prompt that ends in front of the last pair's answer."""
        document = self.clean(pairs)
        return document.ids[: len(document.ids) - len(self.answer_ids[pairs[-1][1]])]

    def _assemble(self, pairs: Sequence[Pair], targets: Sequence[Sequence[int]]) -> Document:
        ids, labels = [self.bos], [IGNORED]
        for number, ((given, answer), target) in enumerate(zip(pairs, targets, strict=True)):
            before = self.separator if number else ()
            question, answered = self.question_ids[given], self.answer_ids[answer]
            ids += [*before, *question, *answered]
            # The label of a position is the *next* token: the question's last token predicts the answer's first.
            labels += [IGNORED] * (len(before) + len(question) - 1)
            labels += [*target, *[IGNORED] * (len(answered) + 1 - len(target))]
        return Document(ids, labels)


def collate(documents: Sequence[Document], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and labels, each (document, token), padded on the right.

    Padding needs no mask: attention is causal and the padded positions have no label.
    """
    length = max(len(document.ids) for document in documents)

    def padded(rows: Sequence[list[int]], value: int) -> torch.Tensor:
        return torch.tensor([row + [value] * (length - len(row)) for row in rows], device=device)

    return padded([d.ids for d in documents], 0), padded([d.labels for d in documents], IGNORED)


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
    with torch.random.fork_rng(devices=[]):  # the caller's random state is not ours to move
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
    """The training loop; returns the lines of the log."""
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
            group["lr"] = config.learning_rate * _rate(step, config)
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
    """Within the context torch computes with so many CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _rate(step: int, config: DemoTrainingConfig) -> float:
    """Linear warm-up, then linear decay to `final_rate`, as a share of the peak."""
    if step <= config.warmup:
        return step / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return 1.0 - (1.0 - config.final_rate) * done


@torch.no_grad()
def validate(model: LlamaForCausalLM, sampler: DocumentSampler, *, seed: int = 0) -> dict[str, float]:
    """Accuracy and P of the answer's first token on validation trials: clean, shuffled-label and zero-shot prompts.

    Means over relations. The trials are the same at every call; their generator is not the one that the pipeline
    draws its trials from.
    """
    rng = random.Random(f"demo-validation:{seed}")
    prompts: dict[str, list[list[int]]] = {"clean": [], "shuffled": [], "zeroshot": []}
    targets: list[int] = []
    for q_id in sampler.names:
        for _ in range(sampler.config.validation_trials):
            clean, corrupted = sampler.trial(rng, q_id)
            prompts["clean"].append(sampler.prompt_ids(clean))
            prompts["shuffled"].append(sampler.prompt_ids(corrupted))
            prompts["zeroshot"].append(sampler.prompt_ids(clean[-1:]))
            targets.append(sampler.answer_ids[clean[-1][1]][0])
    measures: dict[str, float] = {}
    training = model.training
    model.eval()
    target = torch.tensor(targets, device=model.device)
    for name, rows in prompts.items():
        length = max(map(len, rows))
        ids = torch.tensor([row + [0] * (length - len(row)) for row in rows], device=model.device)
        last = torch.tensor([len(row) - 1 for row in rows], device=model.device)
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[torch.arange(len(rows), device=model.device), last]).float()
        measures[f"{name}_acc"] = (logits.argmax(-1) == target).float().mean().item()
        measures[f"{name}_p"] = logits.softmax(-1).gather(1, target[:, None]).mean().item()
    model.train(training)
    return measures


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out_dir: Path) -> Path:
    """Write model and tokenizer beside `out_dir`, then put the folder in place by renaming."""
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    partial = out_dir.with_name(f".{out_dir.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    hf_logging.disable_progress_bar()  # the training's own lines say how far it is
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    for file in partial.iterdir():
        file.chmod(0o644)  # safetensors writes 0600, which other users of an installation could not read
    return partial.rename(out_dir)


def _require_free(out_dir: Path) -> None:
    """Raise InputError, before any training, for a place that holds something."""
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise InputError(f"{out_dir}: already there and not empty; expected a new folder for the model")
