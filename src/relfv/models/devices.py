"""Devices by their names on the command line."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from relfv.errors import DeviceTaken, InputError


def choose_devices(device: str, flag: str = "--device") -> list[torch.device]:
    """The devices that ``device`` names: cards that one model is spread over, as in ``cuda:0+cuda:1``, or a single one.

    Raises InputError for a device that is not there, and for several that are not all different CUDA devices.
    """
    chosen = [choose_device(name.strip(), flag) for name in device.split("+")]
    if len(chosen) > 1 and (len({*chosen}) < len(chosen) or any(one.type != "cuda" for one in chosen)):
        raise InputError(f"{flag} {device!r}: expected different CUDA devices around each +, such as cuda:0+cuda:1")
    return chosen


def choose_device(device: str, flag: str = "--device") -> torch.device:
    """The device of one name; ``auto`` is CUDA if there is one, else the CPU. Raises InputError that names ``flag`` for
    a device that is not there."""
    if device == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise InputError(f"{flag} {device!r}: not a device; expected auto, cpu, cuda, cuda:<n> or mps") from None
    if chosen.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (chosen.index or 0) >= count:
            raise InputError(
                f"{flag} {device!r}: this machine has {count} usable CUDA device(s); use --device cpu, or a PyTorch "
                "build and driver that see your GPU (python -c 'import torch; print(torch.cuda.is_available())')"
            )
        return torch.device("cuda", chosen.index or 0)
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise InputError(f"{flag} {device!r}: no Metal device on this machine; use --device cpu")
    if chosen.type not in ("cpu", "mps") or chosen.index:
        raise InputError(f"{flag} {device!r}: expected auto, cpu, cuda, cuda:<n> or mps")
    return chosen


def taken(devices: list[torch.device]) -> list[torch.device]:
    """Take ``devices`` into use in this process and return them: before anything else is blamed for it, raises
    DeviceTaken for one that lets no further process in."""
    for device in devices:
        try:
            torch.ones(1, device=device)
        except RuntimeError as problem:
            if "busy or unavailable" not in str(problem):
                raise
            raise DeviceTaken(
                f"{device} lets no further process in: CUDA calls it busy or unavailable, as where another process has "
                "it and its compute mode is exclusive (nvidia-smi -q -d COMPUTE). Wait for that process, use another "
                "device, or have the mode set to DEFAULT"
            ) from None
    return devices


def still_compute(devices: Iterable[torch.device]) -> bool:
    """Whether this process can go on with all ``devices``: after some errors of a kernel CUDA refuses everything until
    the process ends."""
    for device in devices:
        try:
            torch.ones(1, device=device).item()
        except torch.OutOfMemoryError:
            continue
        except RuntimeError:
            return False
    return True


def cuda_devices() -> list[str]:
    """The names of all CUDA devices. Raises InputError if there are none."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise InputError("--devices all: this machine has no usable CUDA device; name devices, such as --devices cpu")
    return [f"cuda:{index}" for index in range(count)]
