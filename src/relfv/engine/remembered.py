"""Reuse of an earlier self-check's result when the same model is opened again.

Its finding stands if all that it rests on is the same (``basis``), and if one pass of the engine in use still gives the
log-probabilities that it gave then (``probe``): whatever else may have changed would have to leave these alone. Only
that the shared-prefix engine is right as it stands, kernels included, is ever kept.
"""

from __future__ import annotations

import ctypes
import hashlib
import inspect
import logging
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers

import relfv
from relfv.engine.base import Backbone, Engine, TokenIds
from relfv.engine.fitness import TOLERANCE
from relfv.engine.interventions import sampled_heads
from relfv.engine.selfcheck import SelfCheck, choose_engine
from relfv.engine.shared_prefix import SharedPrefixEngine
from relfv.types import Prompts

log = logging.getLogger(__name__)

_STEERING = ("ATEN_", "CUBLAS", "CUDNN_", "DNNL_", "MKL_", "NVIDIA_TF32", "ONEDNN_", "PYTORCH_", "TORCH_", "TRITON_")
"""Prefixes of environment variables that may change how libraries compute; names of folders (``_DIR``, ``_HOME``) do
not count."""
_DRIVER = "/proc/driver/nvidia/version"


class Findings(Protocol):
    """Store of self-check findings (implemented in store/findings.py)."""

    def get(self, basis: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """The finding kept for exactly this ``basis``; None if there is none."""
        ...

    def keep(self, basis: Mapping[str, Any], finding: Mapping[str, Any]) -> None:
        """Store ``finding`` under ``basis`` for later openings."""
        ...


def remembered(
    backbone: Backbone, prompts: TokenIds, findings: Findings, asked: Mapping[str, Any]
) -> tuple[Engine, SelfCheck]:
    """Return what ``choose_engine`` gives, or what it gave at an earlier opening of the same model; ``asked`` says what
    was opened."""
    try:
        rests_on = {**asked, **basis(backbone, prompts)}
    except (OSError, TypeError, AttributeError):  # something cannot be told: a class in no file, an unknown driver
        return choose_engine(backbone, prompts)
    found = findings.get(rests_on)
    known = _recalled(backbone, prompts, found) if found else None
    if known:
        return known
    engine, check = choose_engine(backbone, prompts)
    # Any other result may have had a reason that goes away, such as a full memory.
    if engine.name == "shared_prefix" and engine.backbone.arithmetic.is_plain == backbone.arithmetic.is_plain:
        found_at = datetime.now(timezone.utc).isoformat(timespec="seconds")
        findings.keep(rests_on, {"check": asdict(check), "probe": probe(engine, prompts), "found_at": found_at})
    return engine, check


def _own_code() -> list[Path]:
    """The files of relfv that compute: a change of a page or a figure leaves a finding as it is."""
    source = Path(relfv.__file__).parent
    return [source / "types.py", *(path for room in ("engine", "models") for path in (source / room).rglob("*.py"))]


def basis(backbone: Backbone, prompts: TokenIds) -> dict[str, Any]:
    """Everything that a self-check of ``backbone`` on ``prompts`` depends on, beside the files that the model was read
    from: code, libraries, hardware, and how the model is laid out and computes."""
    model, arithmetic = backbone.model, backbone.arithmetic
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    return {
        "relfv": [relfv.__version__, relfv.ALGORITHM_VERSION, _hash_of(_own_code())],
        "libraries": [sys.version, torch.__version__, torch.version.git_version, transformers.__version__, _packages()],
        "model_code": _hash_of({Path(inspect.getfile(type(module))) for module in model.modules()}),
        "configs": [[_hash(repr(config)), config._attn_implementation] for config in configs.values()],
        "weights": sorted({str(parameter.dtype) for parameter in model.parameters()}),
        "where": str(backbone.streaming.placement if backbone.streaming else backbone.cards),
        "arithmetic": [arithmetic.precision, arithmetic.facts(), arithmetic.is_plain],
        "architecture": [backbone.arch.family, list(backbone.arch.notes)],
        "devices": [_described(device) for device in backbone.devices],
        "system": platform.platform(),
        "processor": [_processor(), torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()],
        "switches": [
            torch.get_float32_matmul_precision(),
            torch.backends.cuda.matmul.allow_tf32,
            torch.backends.cudnn.allow_tf32,
            torch.are_deterministic_algorithms_enabled(),
            {k: v for k, v in os.environ.items() if k.startswith(_STEERING) and not k.endswith(("_DIR", "_HOME"))},
        ],
        "prompts": [list(prompt) for prompt in prompts],
    }


def _recalled(backbone: Backbone, prompts: TokenIds, found: Mapping[str, Any]) -> tuple[Engine, SelfCheck] | None:
    """Engine and self-check from the earlier finding ``found``; None if it no longer holds."""
    engine = SharedPrefixEngine(backbone)
    try:
        now, then = torch.tensor(probe(engine, prompts)), torch.tensor(found["probe"])
        check = replace(SelfCheck(**found["check"]), found_at=found["found_at"])
    except (KeyError, TypeError, ValueError, RuntimeError) as problem:  # or the engine does not run any more
        log.debug("%s", problem)
        return None
    stands = now.shape == then.shape and bool(((now - then).abs() <= TOLERANCE).all())  # NaN is no agreement
    return (engine, check) if stands else None


def probe(engine: Engine, prompts: TokenIds) -> list[list[float]]:
    """Log-probabilities of each prompt's own last token id, which the model certainly knows, without an edit and with
    each sampled head set to zero in turn: (prompt, 1 + head)."""
    arch = engine.backbone.arch
    zero = torch.zeros(arch.n_layers, arch.n_heads, arch.head_dim)
    effects = engine.sweep_heads(Prompts(prompts, [prompt[-1] for prompt in prompts]), zero, sampled_heads(arch))
    return torch.cat([effects.base.logprob[:, None], effects.edited.logprob], dim=1).tolist()


@cache
def _packages() -> str:
    """Hash of the names and versions of all installed packages."""
    folders = [Path(entry) for entry in sys.path if entry]
    names = {path.name for folder in folders if folder.is_dir() for path in folder.glob("*.*-info")}
    return _hash(repr(sorted(names)))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _hash_of(files: Any) -> str:
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _described(device: torch.device) -> str:
    if device.type != "cuda":
        return str(device)
    of, driver = torch.cuda.get_device_properties(device), ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(driver))
    known = [of.name, of.major, of.minor, of.multi_processor_count, of.total_memory, torch.version.cuda]
    return repr([*known, torch.backends.cudnn.version(), driver.value, _text_of(_DRIVER)])


def _processor() -> list[str]:
    lines = _text_of("/proc/cpuinfo").split("\n\n")[0].splitlines()
    return [line for line in lines if line.startswith(("model name", "flags"))] or [platform.processor()]


def _text_of(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
