from __future__ import annotations

import io
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from folders import sealed
from relfv.errors import InputError, RunError
from relfv.store.formats import (
    _unzipped,
    csv_bytes,
    csv_cell,
    digits,
    json_bytes,
    jsonl_bytes,
    read_csv,
    read_json,
    read_jsonl,
    read_tensors,
    sealed_bytes,
    tensor_bytes,
    unsealed,
)

READERS = {"JSON": read_json, "JSON lines": read_jsonl, "CSV": read_csv, "tensors": read_tensors}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_json_refuses_what_json_cannot_say(value: float) -> None:
    with pytest.raises(ValueError):
        json_bytes({"a": value})
    with pytest.raises(ValueError):
        jsonl_bytes([{"a": value}])


def test_json_is_what_pythons_own_encoder_makes_of_it() -> None:
    """Another encoder writes the same numbers in other digits: where an exponent begins, and how it is written."""
    numbers = [sign * 1.2345678901234567 * 10.0**power for power in range(-320, 308) for sign in (1, -1)]
    numbers += [10.0**power for power in range(-8, 25)] + [-0.0, 2**63, 2**64 - 1, 2**70, True, None, np.float64(1e-5)]
    words = ["1e5", "a: 1e-5", "1e-5,\n", '"\\\x7f\x1f\u2028', "é😀"]
    document = {"numbers": numbers, "words": dict.fromkeys(words, words), 7: [], "nothing": {}, "pair": (1e-5, 1)}
    for some in (document, *document.values(), *numbers):
        assert json_bytes(some) == (json.dumps(some, indent=2, ensure_ascii=False) + "\n").encode()


@pytest.mark.parametrize(("content", "words"), [(None, "no such file"), ("{", "cannot be read as JSON")])
def test_json_that_is_not_there_or_damaged_is_named(tmp_path: Path, content: str | None, words: str) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(RunError if content else InputError, match=words):
        read_json(path)


def test_floats_and_words_come_back_to_the_last_digit_and_letter(tmp_path: Path) -> None:
    value = {"p": 0.1 + 0.2, "tiny": 5e-324, "words": '日本 \u202e\n,"', "none": None}
    (tmp_path / "x.json").write_bytes(json_bytes(value))
    assert read_json(tmp_path / "x.json") == value
    (tmp_path / "x.jsonl").write_bytes(jsonl_bytes([value, {}]))
    assert read_jsonl(tmp_path / "x.jsonl") == [value, {}]
    (tmp_path / "x.csv").write_bytes(csv_bytes([["a", "b"], [value["words"], repr(value["p"])]]))
    assert read_csv(tmp_path / "x.csv") == [{"a": value["words"], "b": repr(value["p"])}]


@pytest.mark.parametrize("form", READERS)
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (os.mkfifo, r"cannot be read \(not a regular file\)"),
        (Path.mkdir, r"cannot be read \(Is a directory\)"),
        (lambda path: path.write_bytes(b"\xff\xfe\0"), "cannot be read as|is not a JSON object"),
        (lambda path: None, "no such file"),
    ],
    ids=["pipe", "folder", "other bytes", "nothing"],
)
def test_what_is_no_such_file_is_one_clear_error_and_never_waited_for(
    tmp_path: Path, form: str, make: Callable[[Path], object], words: str
) -> None:
    make(tmp_path / "x")
    with pytest.raises(InputError if "no such" in words else RunError) as caught:
        READERS[form](tmp_path / "x")
    assert re.match(rf"{re.escape(str(tmp_path / 'x'))}: .*({words})", str(caught.value))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' * 100_000])
def test_nesting_without_end_is_a_damaged_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "x").write_text(text)
    with pytest.raises(RunError, match="cannot be read as JSON"):
        read_json(tmp_path / "x")
    with pytest.raises(RunError, match="line 1 is not a JSON object"):
        read_jsonl(tmp_path / "x")


def test_a_sealed_document_tells_that_it_was_changed(tmp_path: Path) -> None:
    document = sealed({"a": 1, "b": [0.1]})
    assert sealed_bytes({"a": 1, "b": [0.1]}) == json_bytes(document)
    assert unsealed(document, tmp_path) == {"a": 1, "b": [0.1]}
    assert unsealed({"a": 1}, tmp_path, older=True) == {"a": 1}
    for without in ({"a": 1}, {"a": 1, "sha256_of_the_resu": document["sha256_of_the_rest"]}):
        with pytest.raises(RunError, match="does not match its sha256_of_the_rest"):
            unsealed(without, tmp_path)
    for change in ({"a": 2}, {"c": 0}, {"a": float("nan")}, {"sha256_of_the_rest": "0" * 64}):
        with pytest.raises(RunError, match="has been changed since it was written"):
            unsealed({**document, **change}, tmp_path)


# --- tensors, with and without torch ---------------------------------------------------------------------------------

BASE = torch.arange(60, dtype=torch.float32).reshape(3, 4, 5)
CONTENTS = {
    "float32": {"x": torch.randn(3, 4, 5)},
    "float64": {"x": torch.randn(7, dtype=torch.float64)},
    "float16": {"x": torch.randn(7).half()},
    "int64": {"x": torch.tensor([[1, -(2**62)]])},
    "int32": {"x": torch.tensor([1, -2], dtype=torch.int32)},
    "not finite": {"x": torch.tensor([torch.nan, torch.inf, -0.0])},
    "a slice": {"x": BASE[1:, ::2, 1]},
    "transposed": {"x": BASE.transpose(0, 2)},
    "expanded": {"x": torch.tensor([[1.0], [2.0]]).expand(2, 3)},
    "two views of one storage": {"x": BASE[0], "y": BASE[2, 1:]},
    "a scalar": {"x": torch.tensor(2.5), "y": torch.tensor(7)},
    "empty": {"x": torch.zeros(0), "y": torch.zeros(3, 0, 2), "z": BASE[:0]},
    "nested": {"x": {0: BASE, 31: {"deep": torch.ones(2)}}, "slot_q": ["A1"], "n": 25, "alpha": 0.5, "none": None},
}


def same(one: Any, other: Any) -> bool:
    """With NumPy arrays on the left, tensors on the right: equal to the bit, in dtype and shape too."""
    if isinstance(other, dict):
        return isinstance(one, dict) and [*one] == [*other] and all(same(one[key], other[key]) for key in other)
    if isinstance(other, torch.Tensor):
        there = other.contiguous().numpy()
        return (one.dtype, one.shape, one.tobytes()) == (there.dtype, there.shape, there.tobytes())
    return type(one) is type(other) and one == other


def saved(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", CONTENTS)
def test_the_light_reader_agrees_with_torch(kind: str) -> None:
    data = saved(CONTENTS[kind])
    assert same(_unzipped(data), torch.load(io.BytesIO(data), weights_only=True))


@pytest.mark.parametrize("kind", ["float32", "float64", "int64", "empty", "nested"])
def test_what_is_written_is_read_by_both(kind: str, tmp_path: Path) -> None:
    def as_arrays(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.numpy()
        return {key: as_arrays(item) for key, item in value.items()} if isinstance(value, dict) else value

    path = tmp_path / "x.pt"
    path.write_bytes(tensor_bytes(as_arrays(CONTENTS[kind])))
    assert same(read_tensors(path), CONTENTS[kind])
    assert same(read_tensors(path), torch.load(path, weights_only=True))


@pytest.mark.parametrize(
    "data",
    [saved({"x": BASE.bfloat16()}), saved({"x": BASE}, _use_new_zipfile_serialization=False)],
    ids=["bfloat16", "before PyTorch 1.6"],
)
def test_other_kinds_of_files_are_read_by_torch(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(data)
    assert same(read_tensors(tmp_path / "x.pt"), {"x": BASE})


def repacked(data: bytes, change: Callable[[str, bytes], bytes]) -> bytes:
    """A .pt file with ``change`` (name, bytes) made to each of its members."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return buffer.getvalue()


class Calling:
    """Unpickling it calls ``function``: what a hostile file would do."""

    def __init__(self, function: Callable[..., object], *given: object) -> None:
        self.call = function, given

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize("packed", ["a pickle alone", "as torch packs it", "in place of the tensors' pickle"])
def test_code_in_a_file_is_refused_and_not_run(packed: str, tmp_path: Path) -> None:
    mark = tmp_path / "OWNED"
    hostile = {"x": Calling(os.system, f"touch {mark}"), "y": Calling(eval, f"open({str(mark)!r}, 'w')")}
    if packed == "a pickle alone":
        data = pickle.dumps(hostile)
    elif packed == "as torch packs it":
        data = saved(hostile)
    else:
        whole = pickle.dumps(hostile, protocol=2)
        data = repacked(saved({"x": BASE}), lambda name, old: whole if name.endswith("data.pkl") else old)
    path = tmp_path / "x.pt"
    path.write_bytes(data)
    with pytest.raises(RunError, match=r"x\.pt: cannot be read as tensors"):
        read_tensors(path)
    if packed != "a pickle alone":
        with pytest.raises(pickle.UnpicklingError, match=r"system|eval"):
            _unzipped(data)
    assert not mark.exists()
    pickle.loads(pickle.dumps(hostile))  # the file would have done it
    assert mark.exists()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(10).as_strided((10,), (1,), 0),
        BASE[1:, 1::2, 4],
        torch.zeros(4, dtype=torch.float64),
    ],
    ids=["whole", "a slice", "float64"],
)
def test_a_tensor_outside_its_bytes_is_refused(tensor: torch.Tensor, tmp_path: Path) -> None:
    """As a file that was cut, or made to read what lies beyond, would have it."""
    data = repacked(saved({"x": tensor}), lambda name, old: old[:-8] if re.search(r"/data/\d+$", name) else old)
    with pytest.raises(pickle.UnpicklingError, match="outside its bytes"):
        _unzipped(data)
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(RunError, match=r"x\.pt: cannot be read as tensors"):
        read_tensors(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [(-1, (2,), (1,)), (0, (-2,), (1,)), (5, (2,), (-1,)), (0, (9,), (1,)), (7, (2,), (1,)), (0, (2, 2), (6, 2))],
)
def test_offsets_sizes_and_strides_that_lead_outside_are_refused(
    offset: int, size: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    from relfv.store.formats import _tensor

    with pytest.raises(pickle.UnpicklingError, match="outside its bytes"):
        _tensor(np.arange(8, dtype="<f4"), offset, size, stride)


@pytest.mark.parametrize("cut", [0, 1, 100, 400])
def test_a_tensor_file_that_was_cut_is_damaged(cut: int, tmp_path: Path) -> None:
    data = saved({"x": BASE})
    (tmp_path / "x.pt").write_bytes(data[:-cut] if cut else b"")
    with pytest.raises(RunError, match=r"x\.pt: cannot be read as tensors"):
        read_tensors(tmp_path / "x.pt")


def test_digits_give_every_number_back_and_name_what_is_not_finite() -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal(2000) * 10.0 ** rng.integers(-300, 300, 2000)
    values = np.concatenate([values, [0.0, -0.0, 1.0, 1e-5, 1e16, np.inf, -np.inf, np.nan]])
    written = digits(values)
    assert np.array_equal(np.array([float(text) for text in written]), values, equal_nan=True)
    assert written[-3:] == ["inf", "-inf", "nan"]
    assert max(map(len, written)) <= max(map(len, map(repr, values.tolist())))


@pytest.mark.parametrize("mark", ["=", "+", "-", "@"])
def test_words_that_a_spreadsheet_would_take_for_a_formula_are_marked_as_text_and_numbers_are_not(mark: str) -> None:
    assert csv_cell(f"{mark}1+1") == f"'{mark}1+1"
    assert csv_cell(f"a{mark}b") == f"a{mark}b"
    assert (csv_cell(-0.5), csv_cell(-3), csv_cell(None), csv_cell(1e-05)) == ("-0.5", "-3", "", "1e-05")
