from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from relfv.errors import RunError
from relfv.store.safetensors import read_safetensors, safetensors_bytes

ARRAYS = {"b": np.arange(3, dtype=np.float32), "a": np.float32([[1, 2], [3, np.pi]]), "none": np.zeros(0, np.float32)}
METADATA = {"z": "últimó", "a": "1", "m": '{"x": [1]}'}


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    path.write_bytes(safetensors_bytes(ARRAYS, METADATA))
    with safe_open(path, "np") as file:
        assert file.metadata() == METADATA
        assert {name: file.get_tensor(name).tolist() for name in file.keys()} == {  # noqa: SIM118
            name: array.tolist() for name, array in ARRAYS.items()
        }
    arrays, metadata = read_safetensors(path)
    assert (list(arrays), metadata) == (list(ARRAYS), METADATA)
    assert all(np.array_equal(arrays[name], ARRAYS[name]) for name in ARRAYS)


def test_two_processes_write_the_same_bytes() -> None:
    script = (
        "import sys, numpy as np; from relfv.store.safetensors import safetensors_bytes; "
        "sys.stdout.buffer.write(safetensors_bytes({'x': np.ones(2)}, {str(i): 'v' for i in range(40)}))"
    )
    run = [subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout for _ in range(2)]
    assert run[0] == run[1] != b""


@pytest.mark.parametrize("cut", [0, 7, 20, 150, -1])
def test_a_damaged_file_is_said_to_be(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "file.safetensors"
    path.write_bytes(safetensors_bytes({"x": np.ones(4)}, METADATA)[:cut])
    with pytest.raises(RunError, match="is not a safetensors file of float32 arrays"):
        read_safetensors(path)
