"""A checkpoint's weights onto a card as fast as the bus takes them.

transformers copies tensor by tensor out of mapped files, and what the card fetches from there the driver first copies
aside. Here several threads read pieces of the files into page-locked memory, from where the card fetches them while the
others read on. Whatever is out of the ordinary is left to transformers.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from relfv.models.memory import available_bytes, bytes_of_card
from relfv.models.stored import header_of
from relfv.progress import counted

_PIECE = 16 << 20
"""Bytes on their way at a time in each thread."""
_THREADS = 8
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@contextmanager
def reading(
    folder: Path, config: Any, device: torch.device, wanted: Any = "auto"
) -> Iterator[Callable[[], dict[str, torch.Tensor]]]:
    """While open, a thread reads the ``files_to_read``. Yields a function, to be called once, that waits for it and
    gives what ``read_onto`` gives, nothing without such files; it raises what they raise."""
    ended = threading.Event()

    def read() -> dict[str, torch.Tensor]:
        return read_onto(device, files_to_read(folder, config, device, wanted), ended)

    with ThreadPoolExecutor(1, "weights") as pool:
        try:
            begun = [pool.submit(read)]
            yield lambda: begun.pop().result()  # what is read is not kept here, too
        finally:
            ended.set()


def files_to_read(folder: Path, config: Any, device: torch.device, wanted: Any = "auto") -> list[Path]:
    """The safetensors files that transformers would read of a model with this config; none where ``device`` has no room
    for all of them twice, as joining tensors takes, the second time in the ``wanted`` dtype, or where transformers may
    look elsewhere.

    Raises OSError, ValueError or KeyError for an index that is damaged."""
    elsewhere = getattr(config, "transformers_weights", None) or getattr(type(config), "extra_files", ())
    dtype = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)  # by its old name
    # Without a dtype in the config transformers looks into the files.
    if elsewhere or not isinstance(dtype, torch.dtype) or (folder / "adapter_config.json").exists():
        return []
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    files = [single] if single.is_file() else []
    if not files and index.is_file():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        files = [folder / name for name in sorted({*names})]
    times = 1 + max(1, getattr(wanted, "itemsize", 0) / dtype.itemsize)
    return files if times * sum(file.stat().st_size for file in files) < _room(device) else []


def _room(device: torch.device) -> int:
    if device.type != "cuda":
        return available_bytes() or 0
    return min(bytes_of_card(device), torch.cuda.mem_get_info(device)[0])


class _Piece(NamedTuple):
    path: Path
    start: int
    target: torch.Tensor
    """uint8 (byte,): memory that the piece goes to."""


def read_onto(device: torch.device, files: list[Path], ended: threading.Event) -> dict[str, torch.Tensor]:
    """The tensors in safetensors ``files``, by name, on ``device``.

    Raises an error for a file that is damaged, or holds tensors that are not of floating point or not PyTorch's, and
    CancelledError once ``ended`` is set."""
    found, pieces = dict[str, torch.Tensor](), list[_Piece]()
    for path in files:
        with safe_open(path, framework="pt") as file:  # looks whether header and file fit together
            if (file.metadata() or {}).get("format") != "pt":
                raise ValueError(f"{path}: is not PyTorch's")
        header, start = header_of(path)
        for name, stored in header.items():
            tensor = torch.empty(stored["shape"], dtype=_DTYPES[stored["dtype"]], device=device)
            at, found[name] = start + stored["data_offsets"][0], tensor
            of_bytes = tensor.view(-1).view(torch.uint8)
            pieces += [_Piece(path, at + i * _PIECE, part) for i, part in enumerate(of_bytes.split(_PIECE))]
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # this memory may have been another's, and streams do not wait for each other
    lane = _Lane()
    with ThreadPoolExecutor(_THREADS, "weights") as pool:
        carried = pool.map(partial(lane.carry, device), pieces)
        for _ in zip(carried, counted(pieces, lambda piece: len(piece.target) >> 20), strict=True):
            if ended.is_set():
                pool.shutdown(cancel_futures=True)
                raise CancelledError
    return found


class _Lane(threading.local):
    """A page-locked buffer and a stream, which each thread has for itself."""

    buffer: torch.Tensor | None = None
    stream: Any = None

    def carry(self, device: torch.device, piece: _Piece) -> None:
        """Bring one piece to its place on ``device``."""
        if self.buffer is None:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # for this thread, or it would open the first card, too
                self.stream = torch.cuda.Stream()
            self.buffer = torch.empty(_PIECE, dtype=torch.uint8, pin_memory=device.type == "cuda")
        part = self.buffer[: len(piece.target)]
        left = part.numpy().data
        with piece.path.open("rb", buffering=0) as file:
            file.seek(piece.start)
            while left:
                n_read = file.readinto(left)
                if not n_read:
                    raise OSError(f"{piece.path}: ends within its tensors")
                left = left[n_read:]
        with torch.cuda.stream(self.stream):
            piece.target.copy_(part, non_blocking=True)
        if self.stream:
            self.stream.synchronize()
