"""A second opening of a model uses what the first found, and never what is not true of it any more."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import relfv
from relfv.engine.remembered import basis
from relfv.language_model import LanguageModel
from relfv.runs.manifest import model_description
from relfv.runs.qid import open_for
from relfv.settings import Settings
from relfv.store.findings import Findings

AGAIN = 2
"""Passes over the decoder where the finding is taken over: prefix and last tokens."""


@pytest.fixture(scope="module")
def folder(llama_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(llama_path, tmp_path_factory.mktemp("remembered") / "model")


@pytest.fixture(scope="module")
def first(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache folder after the model was opened once."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RELFV_CACHE", str(cache))
        model, passes = opened(folder)
    assert passes > 5 * AGAIN
    assert model.check.found_at is None
    assert len([*cache.rglob("*.json")]) == 1
    return cache


@pytest.fixture
def cache(first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, in use."""
    copy = shutil.copytree(first, tmp_path / "cache")
    monkeypatch.setenv("RELFV_CACHE", str(copy))
    return copy


def opened(folder: Path, **options: str) -> tuple[LanguageModel, int]:
    """The model, and how many passes over its embeddings it took to open it."""
    with counting() as passes:
        model = open_for(replace(Settings(model=str(folder), model_spec="auto", device="cpu"), **options))
    return model, len(passes)


@contextmanager
def counting() -> Iterator[list[int]]:
    passes: list[int] = []
    hook = nn.modules.module.register_module_forward_pre_hook(
        lambda module, _: passes.append(1) if isinstance(module, nn.Embedding) else None
    )
    try:
        yield passes
    finally:
        hook.remove()


def test_a_second_opening_makes_no_self_check_and_says_so(folder: Path, cache: Path) -> None:
    model, passes = opened(folder)
    assert passes == AGAIN
    assert model.check.found_at is not None
    assert f"found on {model.check.found_at}, taken from the cache" in model.check.said
    assert model_description(model)["self_check"]["found_at"] == model.check.found_at
    assert (model.engine.name, model.check.engine) == ("shared_prefix", "shared_prefix")


def test_another_check_is_made_where_it_is_asked_for(folder: Path, cache: Path) -> None:
    model, passes = opened(folder, self_check="always")
    assert passes > AGAIN
    assert model.check.found_at is None


@pytest.mark.parametrize("options", [{"precision": "fast"}, {"dtype": "bf16"}, {"offload": "disk"}])
def test_a_model_opened_otherwise_is_another(options: dict[str, str], folder: Path, cache: Path) -> None:
    model, passes = opened(folder, **options)
    assert passes > AGAIN
    assert model.check.found_at is None
    assert len([*cache.rglob("*.json")]) == 2


OTHERS: dict[str, Callable[[pytest.MonkeyPatch], object]] = {
    "algorithm": lambda patch: patch.setattr(relfv, "ALGORITHM_VERSION", 10**6),
    "PyTorch": lambda patch: patch.setattr(torch.version, "git_version", "another"),
    "packages": lambda patch: patch.setattr("relfv.engine.remembered._packages", lambda: "others"),
    "processor": lambda patch: patch.setattr("relfv.engine.remembered._processor", lambda: ["another"]),
    "variable": lambda patch: patch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2"),
    "switch": lambda patch: patch.setattr(torch, "get_float32_matmul_precision", lambda: "medium"),
    "threads": lambda patch: patch.setattr(torch, "get_num_threads", lambda: 99),
}


def test_a_finding_rests_on_code_libraries_and_hardware(folder: Path, cache: Path) -> None:
    model, prompts = opened(folder)[0], [[1, 2, 3], [4, 5]]
    before = basis(model.backbone, prompts)
    assert basis(model.backbone, prompts) == before
    assert basis(model.backbone, [[1, 2, 3], [4, 6]]) != before
    for what, change in OTHERS.items():
        with pytest.MonkeyPatch.context() as patch:
            change(patch)
            assert basis(model.backbone, prompts) != before, what
    with pytest.MonkeyPatch.context() as patch:  # which names a folder
        patch.setenv("TORCH_HOME", "/elsewhere")
        assert basis(model.backbone, prompts) == before


def test_a_file_that_was_written_again_is_another_even_with_its_old_size_and_time(
    llama_path: Path, cache: Path, tmp_path: Path
) -> None:
    own = shutil.copytree(llama_path, tmp_path / "model")
    opened(own)
    assert opened(own)[1] == AGAIN
    weights = own / "model.safetensors"
    times = weights.stat().st_atime_ns, weights.stat().st_mtime_ns
    weights.write_bytes(weights.read_bytes())
    os.utime(weights, ns=times)
    assert opened(own)[1] > AGAIN


def test_weights_that_changed_unseen_are_found_out_by_one_pass(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if everything on record were the same."""
    (path,) = (cache / "self_checks").iterdir()
    kept = json.loads(path.read_bytes())["finding"]
    monkeypatch.setattr("relfv.store.findings.Findings.get", lambda *_: kept)
    assert opened(folder)[0].check.found_at == kept["found_at"]
    kept["probe"][0][-1] += 0.01
    model, passes = opened(folder)
    assert passes > AGAIN
    assert model.check.found_at is None


def test_a_damaged_cache_is_as_none_and_is_mended(folder: Path, cache: Path) -> None:
    (path,) = (cache / "self_checks").iterdir()
    sound = json.loads(path.read_bytes())
    for content in (b"", b"{}", b"[1]", b"null", b"\xff{", path.read_bytes()[:-9], b'{"basis": {}, "finding": {}}'):
        path.write_bytes(content)
        assert Findings().get(sound["basis"]) is None
    assert opened(folder)[0].check.found_at is None
    assert opened(folder)[1] == AGAIN
    path.write_bytes(path.read_bytes().replace(b"agrees with", b"agreed with"))
    assert Findings().get(sound["basis"]) is None


def test_a_cache_that_cannot_be_written_changes_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("RELFV_CACHE", str(tmp_path / "file"))
    for _ in range(2):
        model, passes = opened(folder)
        assert passes > AGAIN
        assert model.check.found_at is None


def test_what_is_not_right_as_it_stands_and_code_from_elsewhere_are_checked_every_time(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RELFV_CACHE", str(tmp_path))
    open_for(Settings(model=str(folder), model_spec="auto", device="cpu", trust_remote_code=True))
    monkeypatch.setattr("relfv.engine.selfcheck.TOLERANCE", -1.0)
    monkeypatch.setattr("relfv.engine.fitness.TOLERANCE", 1.0)
    assert opened(folder)[0].engine.name == "reference"
    assert not [*tmp_path.rglob("*.json")]
