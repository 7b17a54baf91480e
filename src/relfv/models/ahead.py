"""Work that is begun before PyTorch is there, since importing it and transformers takes seconds in which disk and card
would have nothing to do: weights come from the disk into the system's memory, and the driver makes the card ready."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from relfv.models.memory import available_bytes
from relfv.models.sources import snapshot, weights_source

_STEP = 32 << 20
"""Bytes that are read in one go, which cannot be interrupted."""


@contextmanager
def under_way(name: str, revision: str, device: str) -> Iterator[None]:
    """While open, for imports: the files of the model ``name`` get ready to be read, and ``device`` for use, unless it
    is the empty string, since another process will use it. Threads do that, which end with it.

    They are not needed, and what fails in them is tried again, and explained, by whoever opens the model. Raises
    InputError for a model that is not there.
    """
    ended, was_collecting = threading.Event(), gc.isenabled()
    tasks = [(_read_ahead, _files(name, revision), ended), (_wake, device)]
    threads = [threading.Thread(target=task, args=args, daemon=True) for task, *args in tasks]
    for thread in threads:
        thread.start()
    gc.disable()  # of what modules are made of nothing is garbage, and each look through it takes as long as many
    try:
        yield
    finally:
        if was_collecting:
            gc.enable()
        ended.set()
        for thread in threads:
            thread.join()


def _files(name: str, revision: str) -> list[Path]:
    """The files of weights; none where there is no room to keep them all in memory."""
    place, room = snapshot(*weights_source(name, revision)), available_bytes()
    files = sorted(place.glob("*.safetensors")) if place.is_dir() else [place]
    try:
        return files if sum(file.stat().st_size for file in files) < (room or 0) else []
    except OSError:  # such as a link that leads nowhere
        return []


def _read_ahead(files: list[Path], ended: threading.Event) -> None:
    """Have the system read ``files`` into its memory, without copying them from there."""
    with suppress(OSError, AttributeError), Path(os.devnull).open("wb") as nowhere:  # not every system can do so
        for path in files:
            at = 0
            with path.open("rb") as file:
                while not ended.is_set() and (sent := os.sendfile(nowhere.fileno(), file.fileno(), at, _STEP)):
                    at += sent


def _wake(device: str) -> None:
    """Have NVIDIA's driver make its context on a card, which is the one that PyTorch will use."""
    index = re.fullmatch(r"auto|cuda(?::(\d+))?", device)
    if not index:
        return
    with suppress(OSError, AttributeError):  # there is no such driver
        driver, card, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.c_void_p()
        if not driver.cuInit(0) and not driver.cuDeviceGet(ctypes.byref(card), int(index[1] or 0)):
            driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), card)
