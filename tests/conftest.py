"""Tiny real models: seeded, from configs, with weights scaled up so that effects are really there to be missed."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

# Before torch. Tiny tensors need no threads; processes that tests start inherit what is set, and add as this one does.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
_CACHE = tempfile.TemporaryDirectory(prefix="relfv-cache-")
os.environ["RELFV_CACHE"] = _CACHE.name  # never the user's own

import hypothesis
import pytest
import torch

# A busy machine is no fault.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")

for name in (
    "MODEL", "MODEL_SPEC", "DEVICE", "DTYPE", "QUANT", "SEED", "RELATION_CSV", "N_TRIALS_PER_Q", "N_DEMOS", "SCORE_KEY",
    "TOPK", "ALPHA", "N_EVAL",
):  # fmt: skip
    os.environ.pop(name, None)

ROOT = Path(__file__).resolve().parents[1]

WORDS = [
    ("dog", "puppy"), ("cat", "kitten"), ("cow", "calf"), ("sheep", "lamb"), ("goat", "kid"), ("horse", "foal"),
    ("frog", "tadpole"), ("bear", "cub"), ("swan", "cygnet"), ("eel", "elver"), ("hare", "leveret"), ("owl", "owlet"),
]  # fmt: skip
PLACES = [
    ("france", "paris"), ("japan", "tokyo"), ("new zealand", "wellington"), ("kenya", "nairobi"), ("india", "new delhi"),  # noqa: E501
    ("mexico", "mexico city"), ("peru", "lima"), ("chile", "santiago"), ("cuba", "havana"), ("iran", "tehran"),
    ("iraq", "baghdad"), ("norway", "oslo"), ("egypt", "cairo"),
]  # fmt: skip


def pytest_configure() -> None:
    """A shell starts what runs in the background with SIGINT ignored, which tests of interrupts must not inherit."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that no process is left with a long one when the others have ended."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--write-families`` and ``--write-bad-input`` make their pages in docs/ anew instead of comparing them;
    ``--kills``, ``--faults`` and ``--cuts`` make tests/runs/test_crashes.py thorough."""
    parser.addoption("--write-bad-input", action="store_true", help="write docs/bad_input.md from the tests' list")
    parser.addoption("--write-stages", action="store_true", help="write docs/stages.md from the table of stages")
    parser.addoption("--write-reference", action="store_true", help="write docs/reference/ from the code")
    parser.addoption("--write-schemas", action="store_true", help="write the JSON Schemas from their declarations")
    parser.addoption("--write-families", action="store_true", help="write docs/families.md from what the tests find")
    parser.addoption("--kills", type=int, default=20, help="how many times test_crashes kills a run")
    parser.addoption("--cuts", type=int, default=100, help="after how many power cuts it looks at what is left")
    parser.addoption("--faults", type=int, default=8, help="in how many trees it fails an operation on a file")


@pytest.fixture(scope="session")
def csv_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two eligible relations, interleaved, and one with nine rows."""
    rows = [("A1", *pair) for pair in WORDS] + [("B2", *pair) for pair in PLACES] + [("C3", *p) for p in WORDS[:9]]
    rows.sort(key=lambda row: hash_order(row[1]))
    path = tmp_path_factory.mktemp("csv") / "pairs.csv"
    path.write_text("id,ex_A,ex_B\n" + "".join(f"{q},{a},{b}\n" for q, a, b in rows), encoding="utf-8")
    return path


def hash_order(word: str) -> int:
    """A fixed order that mixes the relations."""
    return sum(ord(char) * 31**i for i, char in enumerate(word)) % 1009


def make_tokenizer(*, bos: bool = True, vocab_size: int = 420):  # type: ignore[no-untyped-def]
    """A real byte-level BPE tokenizer trained on the tests' words, with a BOS of its own or without."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<bos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = [f"Q: {a}\nA: {b}\n\n" for a, b in [*WORDS, *PLACES]] * 3
    tokenizer.train_from_iterator(text, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>")


def scale_up(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random weights large enough that attention is peaked and single heads matter; norms and biases random too."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if id(parameter) in embeddings:
            parameter.data = 0.7 * noise
        elif parameter.dim() > 1:
            parameter.data = 2.0 * noise / parameter.shape[-1] ** 0.5
        else:
            parameter.data = parameter.data + 0.1 * noise
    return model.eval()


def llama(vocab_size: int = 420, **changes):  # type: ignore[no-untyped-def]
    """Llama with grouped keys and head_dim != hidden / heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = {
        "vocab_size": vocab_size, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 10, "tie_word_embeddings": True,
    }  # fmt: skip
    return scale_up(LlamaForCausalLM(LlamaConfig(**{**config, **changes})))


@pytest.fixture(scope="session")
def save_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Save a model with a tokenizer as a folder that from_pretrained opens."""

    def save(model, tokenizer=None) -> Path:  # type: ignore[no-untyped-def]
        folder = tmp_path_factory.mktemp("model") / type(model).__name__
        model.save_pretrained(folder)
        (tokenizer or make_tokenizer()).save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def llama_path(save_model: Callable[..., Path]) -> Path:
    """A folder with a tiny Llama."""
    return save_model(llama())


@pytest.fixture(scope="session")
def finished(llama_path: Path, csv_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the tests' CSV on the tiny Llama: the relation's folder. Read only; copy it to change it."""
    from relfv.cli import main

    out = tmp_path_factory.mktemp("finished")
    arguments = ["run", "--model", str(llama_path), "--relation_csv_path", str(csv_path), "--out_root", str(out)]
    assert main(arguments) == 0
    return out / "pairs"
