"""The text that the demo model reads: its tokenizer, and its training documents and validation trials."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from relfv.demo.recipe import DemoTrainingConfig
from relfv.errors import InputError
from relfv.relations import load_relations

Pair = tuple[str, str]

BOS = "<|begin_of_text|>"
EOS = "<|end_of_text|>"
# Llama-3's pre-tokenisation: the space before a word belongs to the word.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
IGNORED = -100  # the label that torch's cross entropy skips


@dataclass(frozen=True)
class Document:
    """One training sequence: token ids and labels, two lists of one length."""

    ids: list[int]
    """Token ids, BOS first."""
    labels: list[int]
    """The target *at the position that predicts it* (already shifted), IGNORED elsewhere."""


def read_relations(csv_path: str | Path) -> dict[str, list[Pair]]:
    """Read the pairs of each q_id, both in file order."""
    relations = load_relations(Path(csv_path))
    return {q_id: [(pair.input, pair.output) for pair in relation.pairs] for q_id, relation in relations.items()}


def build_tokenizer(
    relations: Mapping[str, Sequence[Pair]], *, in_pieces: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the words of the relations, with Llama-3's pre-tokenisation and BOS.

    BOS comes from the post-processor, so ``tokenizer(text).input_ids`` starts with it exactly once. Each word counts
    the same, whatever its frequency, and merging goes on until every word is one token except those ``in_pieces``.
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
    """A permutation of ``labels`` in which no position keeps its *value*; failing that, the best of ``tries`` shuffles.

    This is not the ``corrupt_labels`` of stages/trials.py, because the shipped weights depend on every random number
    drawn here, and how trials are corrupted must be free to change without them.
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
    """Draws training documents and validation trials. It holds no random state: the caller passes the generator.

    Raises InputError if no relation is large enough for a document.
    """

    def __init__(
        self,
        relations: Mapping[str, Sequence[Pair]],
        tokenizer: PreTrainedTokenizerFast,
        config: DemoTrainingConfig,
    ) -> None:
        # A run skips a relation that is too small for a full prompt, so the model need not learn it.
        self.relations = {q: list(pairs) for q, pairs in relations.items() if len(pairs) >= config.pairs}
        if not self.relations:
            raise InputError(
                f"--relation_csv_path: no relation has {config.pairs} pairs or more; expected at least one to train on"
            )
        self.config = config
        self.names = list(self.relations)
        encode: Any = tokenizer
        self.bos: int = encode.bos_token_id
        self.separator: tuple[int, ...] = tuple(encode("\n\n", add_special_tokens=False).input_ids)
        self.answers_of: dict[str, list[str]] = {}
        """Answers by input, one for each relation that contains it: all are right without demonstrations."""
        for pairs in self.relations.values():
            for given, answer in pairs:
                self.answers_of.setdefault(given, []).append(answer)

        def ids(text: str) -> tuple[int, ...]:
            return tuple(encode(text, add_special_tokens=False).input_ids)

        self.question_ids = {given: ids(f"Q: {given}\nA:") for given in self.answers_of}
        self.answer_ids = {answer: ids(f" {answer}") for answers in self.answers_of.values() for answer in answers}

    def document(self, rng: random.Random) -> Document:
        """Draw a clean or a shuffled document of a random relation."""
        pairs = rng.sample(self.relations[rng.choice(self.names)], self.config.pairs)
        if rng.random() < self.config.shuffled_fraction:
            return self.shuffled(pairs, rng)
        return self.clean(pairs)

    def clean(self, pairs: Sequence[Pair]) -> Document:
        """A clean document: right labels; every token of every answer is a target."""
        return self._assemble(pairs, [self.answer_ids[answer] for _, answer in pairs])

    def shuffled(self, pairs: Sequence[Pair], rng: random.Random) -> Document:
        """A shuffled document: deranged labels; the target is the answer's first token under a random relation that
        contains the input.

        Only the first token, since the tokens after it in the text belong to another word.
        """
        labels = derange([answer for _, answer in pairs], rng)
        targets = [self.answer_ids[rng.choice(self.answers_of[given])][:1] for given, _ in pairs]
        mislabelled = [(given, label) for (given, _), label in zip(pairs, labels, strict=True)]
        return self._assemble(mislabelled, targets)

    def trial(self, rng: random.Random, q_id: str) -> tuple[list[Pair], list[Pair]]:
        """Draw the clean and corrupted pairs of a validation trial; the query is the last pair and keeps its right
        answer."""
        pairs = rng.sample(self.relations[q_id], self.config.pairs)
        labels = derange([answer for _, answer in pairs[:-1]], rng)
        corrupted = [(given, label) for (given, _), label in zip(pairs[:-1], labels, strict=True)]
        return pairs, [*corrupted, pairs[-1]]

    def prompt_ids(self, pairs: Sequence[Pair]) -> list[int]:
        """Token ids of a prompt that ends before the last pair's answer."""
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
    """Put documents into one batch: ids and labels, each int64 (document, token), padded on the right.

    Padding needs no mask: attention is causal and the padded positions have no label.
    """
    return padded([d.ids for d in documents], device), padded([d.labels for d in documents], device, IGNORED)


def padded(rows: Sequence[list[int]], device: torch.device, value: int = 0) -> torch.Tensor:
    """Pad rows to one length: int64 (row, token), each filled up with ``value`` on the right."""
    length = max(map(len, rows))
    return torch.tensor([row + [value] * (length - len(row)) for row in rows], device=device)
