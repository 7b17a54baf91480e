from __future__ import annotations

from pathlib import Path

from relfv.language_model import open_model


def test_facts_say_what_every_record_says_of_an_opened_model(llama_path: Path) -> None:
    model = open_model(str(llama_path), "llama", device="cpu", precision="fast")
    facts = {
        "model": str(llama_path),
        "model_spec": "llama",
        "engine": "shared_prefix",
        "precision": "fast",
        "dtype": "float32",
        "quant": "none",
        "device": "cpu",
        "products": "the checkpoint's dtype",
        "kernels": False,
        "notes": [],
    }
    assert model.facts() == facts
    assert list(model.facts()) == list(facts)
