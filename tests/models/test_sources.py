from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from relfv.errors import InputError
from relfv.models.sources import dtype_name, model_identity

LIGHT = """
import sys
import relfv.models.families, relfv.models.sources
from relfv.models.sources import dtype_name, model_identity, model_source
assert dtype_name("bf16") == "bfloat16"
model_source("demo"), model_identity("demo")
print([name for name in ("torch", "transformers", "numpy", "scipy") if name in sys.modules])
"""


def test_checking_names_and_identifying_a_folder_import_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_a_dtype_has_a_short_name_and_an_unknown_one_is_refused() -> None:
    assert [dtype_name(name) for name in ("auto", "fp32", "float16")] == ["auto", "float32", "float16"]
    with pytest.raises(InputError, match="--dtype 'float8': expected one of auto, float32"):
        dtype_name("float8")


def test_a_hub_that_cannot_be_reached_is_told_at_once(tmp_path: Path) -> None:
    with socket.socket() as unheard:  # bound, and nobody listens
        unheard.bind(("127.0.0.1", 0))
        hub = {
            "HF_ENDPOINT": f"http://127.0.0.1:{unheard.getsockname()[1]}",
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path),
        }
        code = "from relfv.models.sources import hub_commit; hub_commit('someone/model')"
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | hub, capture_output=True, text=True, check=False
        )
    assert "it is not in the local cache, and the hub cannot be reached" in done.stderr
    assert "Retry" not in done.stderr


def test_identity_follows_the_content_and_not_the_path(llama_path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(llama_path, copy)
    assert model_identity(str(copy)) == model_identity(str(llama_path))
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(bytes(weights))
    assert model_identity(str(copy)) != model_identity(str(llama_path))


def test_a_large_file_that_was_cut_or_grew_is_another_model(llama_path: Path, tmp_path: Path) -> None:
    found = set()
    for size in (17 << 20, 18 << 20):  # of zeros, so that all that is read of them is alike
        copy = Path(shutil.copytree(llama_path, tmp_path / str(size)))
        with (copy / "model.safetensors").open("wb") as file:
            file.truncate(size)
        found.add(model_identity(str(copy)))
    assert len(found) == 2
