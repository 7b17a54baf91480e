"""What is begun while libraries are imported."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from relfv.errors import InputError
from relfv.models.ahead import under_way

LIGHT = """
import sys
from relfv.models.ahead import under_way
with under_way("demo", "", "auto"):
    pass
print([name for name in ("torch", "transformers", "huggingface_hub") if name in sys.modules])
"""


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda:7", "cuda:0+cuda:1", "nonsense", ""])
def test_nothing_is_left_running_and_garbage_is_collected_again(device: str, llama_path: Path) -> None:
    before = threading.active_count()
    with under_way(str(llama_path), "", device):
        assert not gc.isenabled()
    assert (gc.isenabled(), threading.active_count()) == (True, before)


def test_so_it_is_after_an_error_which_passes_through(llama_path: Path) -> None:
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError), under_way(str(llama_path), "", "auto"):
        _ = 1 // 0
    assert (gc.isenabled(), threading.active_count()) == (True, before)


def test_who_collects_no_garbage_still_does_not(llama_path: Path) -> None:
    gc.disable()
    try:
        with under_way(str(llama_path), "", "cpu"):
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_model_that_is_not_there_is_named_before_anything_is_imported() -> None:
    with pytest.raises(InputError, match="no such folder"), under_way("./nowhere", "", "cpu"):
        pass
    assert gc.isenabled()


def test_it_needs_neither_torch_nor_transformers() -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_link_that_leads_nowhere_is_left_to_who_opens_the_model(llama_path: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((llama_path / "config.json").read_bytes())
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone")
    with under_way(str(tmp_path), "", "cpu"):
        pass
