"""Files of float32 arrays that say what they are: safetensors, written and read without its library or torch.

The library writes metadata in an order that differs from process to process; here the same content gives the same
bytes. The format: eight bytes with the header's length, the header as JSON, then the arrays' bytes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from relfv.errors import InputError, RunError
from relfv.store.files import read_bytes

_ALIGNMENT = 8
"""Number of bytes of which the arrays' start is a multiple, as the library does it."""


def safetensors_bytes(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """Encode arrays, as float32, and their metadata, in the order given."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    stored, end = [], 0
    for name, array in arrays.items():
        data = np.ascontiguousarray(array, "<f4").tobytes()
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [end, end + len(data)]}
        end += len(data)
        stored.append(data)
    text = json.dumps(header, ensure_ascii=False, allow_nan=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text + b"".join(stored)


def read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read a file. -> (float32 arrays by name, metadata). Raises InputError if there is no such file, RunError if it is
    not a safetensors file of float32 arrays."""
    try:
        data = read_bytes(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; expected a safetensors file") from None
    except OSError as problem:
        raise RunError(f"{path}: cannot be read ({problem.strerror})") from None
    try:
        begin = 8 + struct.unpack_from("<Q", data)[0]
        header = json.loads(data[8:begin])
        metadata = {str(key): str(value) for key, value in header.pop("__metadata__", {}).items()}
        arrays = {name: _array(memoryview(data)[begin:], **entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as problem:
        raise RunError(f"{path}: is not a safetensors file of float32 arrays ({problem})") from None
    return arrays, metadata


def _array(data: memoryview, dtype: str, shape: list[int], data_offsets: list[int]) -> np.ndarray:
    if dtype != "F32":
        raise ValueError(f"its arrays are {dtype}")
    return np.frombuffer(data[slice(*data_offsets)], "<f4").reshape(shape).copy()
