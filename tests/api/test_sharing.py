from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import relfv
from parity import assert_close, largest
from relfv.api import sharing


@pytest.fixture
def fv(finished: Path) -> relfv.FunctionVector:
    return relfv.load(finished)["A1"].function_vector.at(layer=1, alpha=2.0)


def same(one: relfv.FunctionVector, other: relfv.FunctionVector) -> bool:
    values = [(x.layer, x.alpha, x.heads, x.q_id, x.model, sorted(x.by_layer)) for x in (one, other)]
    parts = all(np.array_equal(one.by_layer[layer], other.by_layer[layer]) for layer in one.by_layer)
    return values[0] == values[1] and np.array_equal(one.vector, other.vector) and parts


def test_what_is_saved_is_read_again(fv: relfv.FunctionVector, tmp_path: Path) -> None:
    assert fv.save(tmp_path) == tmp_path / "function_vector.safetensors"
    assert same(relfv.FunctionVector.read(fv.save(tmp_path / "mine.safetensors")), fv)
    with pytest.raises(relfv.InputError, match="no such file"):
        relfv.FunctionVector.read(tmp_path / "none.safetensors")
    (tmp_path / "odd.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(relfv.RunError, match="is not a safetensors file"):
        relfv.FunctionVector.read(tmp_path / "odd.safetensors")


def test_a_hub_repository_holds_the_file_and_a_card(fv: relfv.FunctionVector, tmp_path: Path) -> None:
    folder = sharing.write_folder(fv, tmp_path / "repository")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "function_vector.safetensors"]
    assert same(relfv.FunctionVector.read(folder / "function_vector.safetensors"), fv)
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: relfv\n")
    for said in (fv.model, fv.metadata["model_identity"], "block 1", "2 times", "No space after the colon"):
        assert said in card


def test_what_was_pushed_is_found_in_the_cache(
    fv: relfv.FunctionVector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's cache as a download leaves it."""
    import huggingface_hub.constants as hub

    repository, commit = tmp_path / "models--me--vector", "0" * 40
    sharing.write_folder(fv, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    assert same(relfv.FunctionVector.from_hub("me/vector"), fv)


def test_without_a_network_one_line_says_so(fv: relfv.FunctionVector) -> None:
    with pytest.raises(relfv.InputError, match=r"'me/nothing': no function_vector.safetensors to be had: [^\n]*$"):
        relfv.FunctionVector.from_hub("me/nothing")
    with pytest.raises(relfv.RunError, match=r"me/nothing: cannot be written on the hub: [^\n]*$"):
        fv.push_to_hub("me/nothing")


def test_a_control_vector_is_read_by_gguf(fv: relfv.FunctionVector, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(fv.to_gguf(tmp_path / "fv.gguf"))
    (tensor,) = reader.tensors
    assert (tensor.name, tensor.tensor_type.name) == ("direction.1", "F32")
    assert np.array_equal(tensor.data, np.float32(2.0) * fv.vector)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "controlvector"
    assert fields["controlvector.model_hint"] == "llama"
    with pytest.raises(relfv.InputError, match=r"its layer is 0, .* fv.at\(layer=1\)"):
        fv.at(layer=0).to_gguf(tmp_path / "none.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["fv.gguf"]


def test_a_steering_vector_adds_the_same_after_the_same_block(fv: relfv.FunctionVector, llama_path: Path) -> None:
    pytest.importorskip("steering_vectors")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(llama_path)
    prompt = fv.prompt("dog", AutoTokenizer.from_pretrained(llama_path))
    n = prompt["input_ids"].shape[1]
    with torch.no_grad():
        with fv.apply(model):
            expected = model(**prompt).logits[0, -1]
        with fv.to_steering_vector().apply(model, min_token_index=n - 1):
            found = model(**prompt).logits[0, -1]
        plain = model(**prompt).logits[0, -1]
    assert_close(found, expected)
    assert largest(found - plain) > 0.01


@pytest.mark.parametrize(
    ("package", "use", "said"),
    [
        ("gguf", "to_gguf", r"pip install 'relfv\[gguf\]'"),
        ("steering_vectors", "to_steering_vector", "pip install steering-v"),
    ],
)
def test_a_missing_package_is_named(
    fv: relfv.FunctionVector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, use: str, said: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(relfv.InputError, match=said):
        getattr(fv, use)(*[tmp_path / "x"][: use == "to_gguf"])
