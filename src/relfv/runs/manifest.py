"""``run_manifest.json``: what ran, with which settings, versions and device."""

from __future__ import annotations

import logging
import os
import platform
import subprocess
import sys
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relfv import ALGORITHM_VERSION, __version__
from relfv.errors import InputError, RelfvError, RunError
from relfv.settings import Settings
from relfv.store.files import move_aside, write_atomic
from relfv.store.formats import read_json, sealed_bytes, unsealed
from relfv.store.locks import sole_writer

if TYPE_CHECKING:  # reading a manifest needs no engine
    from relfv.engine.base import Backbone
    from relfv.language_model import LanguageModel

log = logging.getLogger(__name__)

MANIFEST = "run_manifest.json"
"""Name of the manifest, beside the q_ids' folders."""
OF_SHARD = ".shard_{}_of_{}"
"""Ending of the names of files that a run with some of the q_ids (``--shard``) writes beside their folders."""

_LIBRARIES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "matplotlib",
    "accelerate",
    "bitsandbytes",
)


def run_description(settings: Settings, q_list: list[str], csv_sha256: str, model_identity: str) -> dict[str, Any]:
    """Describe a run as far as it is known before the model is opened."""
    departures = settings.departures()
    return {
        "relfv_version": __version__,
        "algorithm_version": ALGORITHM_VERSION,
        "spec_conformant": not departures,
        "departures": departures,
        "settings": settings.to_json(),
        "q_list": q_list,
        "csv_sha256": csv_sha256,
        "model_id": settings.model,
        "model_revision": model_identity.partition("@")[2] or None,
        "model_identity": model_identity,
        "git_commit": _git_commit(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _LIBRARIES}},
        "platform": platform.platform(),
        "pid": os.getpid(),
        "command": [Path(sys.argv[0]).name.replace("__main__.py", "relfv"), *sys.argv[1:]],
    }


def model_description(model: LanguageModel) -> dict[str, Any]:
    """Describe the model, once it is open."""
    import torch

    device, arch, facts = model.backbone.device, model.arch, model.facts()
    return {
        "class": type(model.backbone.model).__name__,
        "family": arch.family,
        "n_layers": arch.n_layers,
        "n_heads": arch.n_heads,
        "layers_with_attention": [*arch.out_projs],
        "head_dim": arch.head_dim,
        "resid_dim": arch.resid_dim,
        **{name: facts[name] for name in ("dtype", "quant", "precision")},
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "weights": _where(model.backbone),
        "cpu_threads": torch.get_num_threads(),
        "engine": facts["engine"],
        "self_check": vars(model.check),
        "notes": facts["notes"],
    }


def _where(backbone: Backbone) -> str:
    if backbone.streaming:
        return str(backbone.streaming.placement)
    return str(backbone.cards) if backbone.cards else "on the device"


def write_manifest(path: Path, run: dict[str, Any]) -> Path:
    """Write this run's description to ``path``, which for a shard has a name of its own; earlier runs are kept under
    ``earlier_runs``."""
    with sole_writer(path.parent) if path.name == MANIFEST else nullcontext():
        earlier: list[Any] = []
        previous = sound_manifest(path)
        if previous:
            earlier = [*previous.pop("earlier_runs", []), previous]
        # Two runs at once take turns: each replaces its own earlier description, wherever the other has put it.
        earlier = [other for other in earlier if _identity(other) != _identity(run)]
        return write_atomic(path, sealed_bytes({**run, "earlier_runs": earlier}))


def gather_shards(folder: Path) -> bool:
    """Copy the descriptions that runs of ``--shard`` have written into the manifest. -> whether it lacked any."""
    path = folder / MANIFEST
    runs = [run for shard in folder.glob(MANIFEST + OF_SHARD.format("*", "*")) for run in manifest_runs(shard)]
    there = manifest_runs(path) if runs and sound_manifest(path) else []
    new = [run for run in runs if run not in there]
    for run in sorted(new, key=lambda run: str(run.get("started_at"))):
        write_manifest(path, run)
    return bool(new)


def _identity(run: dict[str, Any]) -> tuple[Any, Any]:
    return run.get("started_at"), run.get("pid")


def sound_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest at ``path``, or None if there is none, or if it is damaged: then it is put aside, with a warning. It
    is a record, and no reason not to run."""
    if not os.path.lexists(path):
        return None
    try:
        return read_manifest(path)
    except RelfvError as problem:
        log.warning("%s; it is now %s", problem, move_aside(path))
    return None


def read_manifest(path: Path) -> dict[str, Any]:
    """Read the manifest, without its own hash. Raises RunError if it is not as it was written."""
    content = read_json(path)
    if not isinstance(content, dict) or not {"settings", "q_list"} <= content.keys():
        raise RunError(f"{path}: is damaged or not a manifest of relfv")
    # The first manifests had no seal.
    return unsealed(content, path, older=content.get("algorithm_version") in (None, 1))


def recorded_run(path: Path) -> tuple[Settings, list[str]]:
    """Settings and q_ids of the last run that the manifest at ``path`` describes. Raises InputError."""
    if not path.is_file():
        raise InputError(f"--config {path}: no such file; expected a {MANIFEST} that 'relfv run' wrote")
    try:
        manifest = read_manifest(path)
        return Settings.from_json(manifest["settings"]), [*map(str, manifest["q_list"])]
    except (RunError, TypeError, AttributeError) as problem:
        raise InputError(f"--config {path}: is no {MANIFEST} as 'relfv run' wrote it ({problem})") from None


def manifest_runs(path: Path) -> list[dict[str, Any]]:
    """The last run that the manifest at ``path`` describes, and the earlier ones. Raises RelfvError."""
    manifest = read_manifest(path)
    runs = [manifest, *manifest.pop("earlier_runs", [])]
    if not all(
        isinstance(run, dict) and isinstance(run.get("settings"), dict) and isinstance(run.get("q_list"), list)
        for run in runs
    ):
        raise RunError(f"{path}: is damaged or not a manifest of relfv")
    return runs


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the folder the run was started in, if it is a git checkout."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
            cwd=os.getcwd(),  # noqa: PTH109
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
