"""Weights that several threads read: the very ones that transformers would have read."""

from __future__ import annotations

import json
import threading
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from conftest import llama
from relfv.errors import InputError
from relfv.models.kinds import model_class
from relfv.models.opening import _loaded, _old_transformers, _read_first, load_checkpoint, quiet_transformers
from relfv.models.reading import _Lane, _Piece, files_to_read, read_onto, reading
from zoo import ZOO

CPU = torch.device("cpu")
BUILDS = {name: ZOO[name].build for name in ("GPT-2: Conv1D, learned positions",)}
BUILDS |= {family: next(a.build for a in ZOO.values() if a.family == family) for family in ("Mixtral", "LLaVA")}


def read_first(kind: Any, folder: Path, config: Any, options: dict[str, Any]) -> Any:
    with reading(folder, config, CPU) as read:
        return _read_first(kind, config, options, read)


def both_ways(folder: Path, **options: Any) -> tuple[Any, Any]:
    """The model of ``folder`` by threads, and by transformers alone; each with what it says of missing tensors."""
    kind, config = model_class(str(folder), str(folder), {"trust_remote_code": False})
    dtype = {"torch_dtype" if _old_transformers() else "dtype": options.pop("dtype", "auto")}
    options = {"device_map": {"": "cpu"}, "output_loading_info": True, "ignore_mismatched_sizes": True, **dtype}
    with quiet_transformers():
        return read_first(kind, folder, config, options), _loaded(kind, str(folder), options)


def assert_same(ours: Any, theirs: Any) -> None:
    assert {**ours[1]} == {**theirs[1]}
    for state in ("state_dict", "named_buffers"):
        here, there = dict(getattr(ours[0], state)()), dict(getattr(theirs[0], state)())
        assert here.keys() == there.keys()
        for name, tensor in here.items():
            assert (tensor.dtype, tensor.stride()) == (there[name].dtype, there[name].stride()), name
            assert torch.equal(tensor, there[name]), name
    assert ours[0].config._attn_implementation == theirs[0].config._attn_implementation


@pytest.mark.parametrize("name", BUILDS)
def test_a_model_is_the_one_that_transformers_reads(name: str, tmp_path: Path) -> None:
    BUILDS[name]().save_pretrained(tmp_path)
    assert_same(*both_ways(tmp_path))


@pytest.mark.parametrize("change", [{}, {"dtype": torch.bfloat16}])
def test_so_it_is_in_several_files_and_in_another_dtype(change: dict[str, Any], tmp_path: Path) -> None:
    llama(tie_word_embeddings=False).save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same(*both_ways(tmp_path, **change))


def test_tensors_larger_than_a_piece_arrive_whole_and_in_their_dtypes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    stored = {
        "large": torch.randn(1100, 4096),  # 18 MB
        "bf16": torch.randn(5, 3).bfloat16(),
        "scalar": torch.tensor(2.5, dtype=torch.float16),
        "empty": torch.zeros(0, 4),
    }
    save_file(stored, tmp_path / "a.safetensors", {"format": "pt"})
    save_file({"other": torch.arange(7.0)}, tmp_path / "b.safetensors", {"format": "pt"})
    read = read_onto(CPU, [tmp_path / "a.safetensors", tmp_path / "b.safetensors"], threading.Event())
    expected = {**load_file(tmp_path / "a.safetensors"), **load_file(tmp_path / "b.safetensors")}
    assert read.keys() == expected.keys()
    assert all(
        read[name].dtype == tensor.dtype and torch.equal(read[name], tensor) for name, tensor in expected.items()
    )


def test_what_is_out_of_the_ordinary_is_left_to_transformers(llama_path: Path, tmp_path: Path) -> None:
    kind, config = model_class(str(llama_path), "it", {"trust_remote_code": False})
    assert files_to_read(llama_path, config, CPU) == [llama_path / "model.safetensors"]
    assert files_to_read(tmp_path, config, CPU) == []
    (tmp_path / "pytorch_model.bin").touch()
    assert read_first(kind, tmp_path, config, {}) is None
    save_file({"model.norm.weight": torch.ones(48, dtype=torch.int8)}, tmp_path / "model.safetensors", {"format": "pt"})
    assert read_first(kind, tmp_path, config, {}) is None


@pytest.mark.parametrize("damage", ["cut", "header", "missing"])
def test_damaged_files_end_no_differently_and_leave_no_thread_behind(
    damage: str, llama_path: Path, tmp_path: Path
) -> None:
    before = threading.active_count()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((llama_path / name).read_bytes())
    whole, weights = (llama_path / "model.safetensors").read_bytes(), tmp_path / "model.safetensors"
    if damage == "missing":
        index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        weights.write_bytes(whole[:-100] if damage == "cut" else b"\xff" * 64 + whole[64:])
    kind, config = model_class(str(tmp_path), "it", {"trust_remote_code": False})
    assert read_first(kind, tmp_path, config, {}) is None
    asked: dict[str, Any] = {"revision": "", "device": "cpu", "dtype": "auto", "quant": "none", "offload": "auto"}
    with pytest.raises(InputError, match="cannot open its model"):
        load_checkpoint(str(tmp_path), "auto", exact=True, trust_remote_code=False, **asked)
    assert threading.active_count() == before


def test_a_file_that_is_cut_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({f"t{i}": torch.ones(5 << 20) for i in range(3)}, path, {"format": "pt"})
    piece = _Piece(path, path.stat().st_size - 8, torch.empty(16, dtype=torch.uint8))
    with pytest.raises(OSError, match="ends within its tensors"):
        _Lane().carry(CPU, piece)


def test_reading_ends_with_what_it_was_for_and_leaves_no_thread_behind(tmp_path: Path) -> None:
    save_file({f"t{i}": torch.ones(5 << 20) for i in range(20)}, tmp_path / "model.safetensors", {"format": "pt"})
    before = threading.active_count()
    with (
        pytest.raises(InputError, match="no tokenizer"),
        reading(tmp_path, tf.LlamaConfig(dtype=torch.float32), CPU) as read,
    ):
        raise InputError("no tokenizer")
    assert threading.active_count() == before
    with pytest.raises(CancelledError):
        read()
