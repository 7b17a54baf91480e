"""Encode artifacts for disk, as JSON, JSON lines, CSV and tensors, and read them back.

Floats keep every digit, so a stage that reads its input and one that has it in memory give the same bytes. Readers
raise InputError for a file that is not there and RunError, with the path, for one that is not what it should be.
"""

from __future__ import annotations

import csv
import io
import json
import math
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from relfv.errors import InputError, RelfvError, RunError
from relfv.store.files import read_bytes, sha256_bytes

_INDENTED = orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE
_INDENTED |= orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_DATETIME
_on_a_line = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
_SMALL_OR_LARGE = re.compile(rb" (-?(?:0\.0000\d+|\d[\d.]*e-?\d+))(?=,?\n)")


def json_bytes(value: Any) -> bytes:
    """Encode as indented UTF-8 JSON in reading order; NaN and infinities are refused, since JSON has none."""
    try:
        data = orjson.dumps(value, option=_INDENTED)
    except TypeError:  # keys that are numbers, or numbers of more than 64 bits
        return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
    if b"null" in data:  # null may have been NaN, which this refuses
        json.dumps(value, allow_nan=False)
    # Write very small and large numbers as Python does, 1e-05 and not 0.00001. Only lines of a number end in a digit.
    return _SMALL_OR_LARGE.sub(lambda found: f" {float(found[1])!r}".encode(), b" " + data)[1:]


def jsonl_bytes(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Encode as JSON lines, one object on each line."""
    return "".join(_on_a_line(row) + "\n" for row in rows).encode()


def csv_bytes(rows: Iterable[Sequence[str]]) -> bytes:
    """Encode as CSV: comma-separated lines, the header first."""
    buffer = io.StringIO(newline="")
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue().encode()


def csv_cell(value: Any) -> str:
    """Format a value for a table: floats with every digit, nothing for None, and an apostrophe before words that a
    spreadsheet would take for a formula, which is how spreadsheets mark a cell as text."""
    if isinstance(value, float):  # most are
        return repr(value)
    if isinstance(value, str):
        return f"'{value}" if value.startswith(("=", "+", "-", "@")) else value
    return "" if value is None else str(value)


def digits(values: np.ndarray) -> list[str]:
    """Format numbers, float64 (n,), each in the fewest digits that give it back; values that are not finite, which JSON
    lacks, become ``inf`` or ``nan`` as in CSV. For tens of thousands, ``repr`` takes longer than the GPU takes to
    compute the effects."""
    text = orjson.dumps(np.ascontiguousarray(values, np.float64), option=orjson.OPT_SERIALIZE_NUMPY)
    written = text[1:-1].decode().split(",")
    for i in np.flatnonzero(~np.isfinite(values)):
        written[i] = repr(float(values[i]))
    return written


def tensor_bytes(content: Mapping[str, Any]) -> bytes:
    """Encode as a ``.pt`` file that ``torch.load(weights_only=True)`` opens; NumPy arrays become tensors."""
    import torch

    def as_tensors(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return torch.from_numpy(value)
        return {key: as_tensors(item) for key, item in value.items()} if isinstance(value, dict) else value

    buffer = io.BytesIO()
    torch.save({key: as_tensors(value) for key, value in content.items()}, buffer)
    return buffer.getvalue()


def finite(value: float) -> float | None:
    """``value``, or None in place of infinities and NaN, which JSON does not have."""
    return float(value) if math.isfinite(value) else None


def read_json(path: Path) -> Any:
    """Read the content of a JSON file."""
    return _read(path, "JSON", json.loads)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read the objects of a file of JSON lines. RunError names the first line that is no object."""

    def parse(data: bytes) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for number, line in enumerate(data.splitlines(), start=1):
            try:
                rows.append(dict(json.loads(line)))
            except (ValueError, TypeError, RecursionError):
                raise RunError(f"{path}: line {number} is not a JSON object") from None
        return rows

    return _read(path, "JSON lines", parse)


def read_csv(path: Path) -> list[dict[str, str]]:
    """Read the rows of a CSV file, as dicts by the names of its header."""
    return _read(path, "CSV", lambda data: list(csv.DictReader(io.StringIO(data.decode()))))


def read_tensors(path: Path) -> Any:
    """Read the content of a ``.pt`` file, its tensors as NumPy arrays. No code of the file is run.

    Files as relfv writes them are read without torch, which takes seconds to import; any other kind by
    ``torch.load(weights_only=True)``.
    """

    def parse(data: bytes) -> Any:
        try:
            return _unzipped(data)
        except (zipfile.BadZipFile, pickle.UnpicklingError):
            return _loaded_by_torch(data)

    return _read(path, "tensors", parse)


def sealed_bytes(content: dict[str, Any]) -> bytes:
    """Encode ``content`` as JSON with a hash of itself as its last key, for a file that no status vouches for."""
    return with_seal(json_bytes(content))


def with_seal(rest: bytes) -> bytes:
    """Add a hash of ``rest`` as the last key of its JSON, whose last line is the object's closing brace."""
    return rest.removesuffix(b"\n}\n") + f',\n  "{SEAL}": "{sha256_bytes(rest)}"\n}}\n'.encode()


SEAL = "sha256_of_the_rest"
"""The key under which a file holds a hash of itself."""


def is_as_sealed(data: bytes) -> bool:
    """Whether ``data`` are bytes as ``sealed_bytes`` wrote them, by their text alone: to encode JSON again takes ten
    times as long. A file that was only laid out anew needs ``unsealed``."""
    rest, _, seal = data.rpartition(f',\n  "{SEAL}": "'.encode())
    return seal == sha256_bytes(rest + b"\n}\n").encode() + b'"\n}\n'


def unsealed(content: dict[str, Any], path: Path, *, older: bool = False) -> dict[str, Any]:
    """Check the hash of ``content``, which was read from ``path``. -> the content without it. Raises RunError if it is
    not as it was written, or its hash is gone; ``older`` allows what an earlier version wrote without one."""
    rest = {key: value for key, value in content.items() if key != SEAL}
    if SEAL not in content and older:
        return rest
    try:
        holds = content.get(SEAL) == sha256_bytes(json_bytes(rest))
    except ValueError:  # NaN, which json parses but relfv never writes
        holds = False
    if not holds:
        raise RunError(f"{path}: has been changed since it was written: it does not match its {SEAL}")
    return rest


def _read(path: Path, form: str, parse: Callable[[bytes], Any]) -> Any:
    try:
        return parse(read_bytes(path))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; an earlier stage has not run, or the file was removed") from None
    except RelfvError:
        raise
    except OSError as problem:
        raise RunError(f"{path}: cannot be read ({problem.strerror})") from None
    except Exception as problem:  # damaged bytes raise many kinds; all mean the same here
        raise RunError(f"{path}: cannot be read as {form} ({type(problem).__name__}: {problem})") from None


# The pickle inside names the dtype of each tensor's bytes by a class of torch.
_DTYPES = {
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
    "HalfStorage": "<f2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
}


def _unzipped(data: bytes) -> Any:
    """Read the content of a file that ``torch.save`` wrote: a zip of one pickle, and the bytes of each tensor beside
    it."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        folder = name.removesuffix("data.pkl")
        return _Unpickler(archive.read(name), lambda key: archive.read(f"{folder}data/{key}")).load()


class _Unpickler(pickle.Unpickler):
    """Unpickler that knows tensors of the dtypes above and ordinary containers, and refuses everything else."""

    def __init__(self, pickled: bytes, stored: Callable[[str], bytes]) -> None:
        super().__init__(io.BytesIO(pickled))
        self._stored = stored

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        raise pickle.UnpicklingError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> np.ndarray:
        _, dtype, key, _, _ = pid
        return np.frombuffer(self._stored(key), dtype)


def _tensor(stored: np.ndarray, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> np.ndarray:
    end = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1
    if min((offset, *size, *stride), default=0) < 0 or (0 not in size and end > len(stored)):
        raise pickle.UnpicklingError("a tensor outside its bytes")
    strides = [step * stored.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(stored[offset:], size, strides).copy()


def _loaded_by_torch(data: bytes) -> Any:
    import torch

    def as_arrays(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return (value.float() if value.is_floating_point() else value).numpy()
        return {key: as_arrays(item) for key, item in value.items()} if isinstance(value, dict) else value

    return as_arrays(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))
