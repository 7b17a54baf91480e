"""A model that stages can use: a checkpoint, its arithmetic, and the engine that the self-check chose for it."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from relfv.engine.arithmetic import Arithmetic, Precision, first_use
from relfv.engine.base import Backbone, Engine
from relfv.engine.remembered import Findings, remembered
from relfv.engine.selfcheck import SelfCheck, choose_engine
from relfv.errors import InputError
from relfv.models.architecture import Architecture
from relfv.models.context import Context, context_of
from relfv.models.given import GivenModel
from relfv.models.opening import Checkpoint, load_checkpoint
from relfv.models.sources import files_state, model_identity
from relfv.models.tokens import Tokens
from relfv.progress import at_work

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LanguageModel:
    """An opened model with everything stages need of it."""

    name: str
    """Name of the model as the user gave it; ``model`` in artifacts."""
    spec: str
    """Family as the user gave it; ``model_spec`` in artifacts."""
    backbone: Backbone
    tokens: Tokens
    engine: Engine
    check: SelfCheck
    dtype: str
    """dtype of the stored weights, e.g. ``bfloat16``; the arithmetic is ``precision``."""
    quant: str

    @property
    def arch(self) -> Architecture:
        """The model's blocks, projections and dimensions."""
        return self.backbone.arch

    @property
    def context(self) -> Context:
        """Length of the prompts that the model takes."""
        return context_of(self.backbone.model.config)

    @property
    def precision(self) -> str:
        """Precision of the arithmetic: ``exact`` or ``fast``."""
        return self.backbone.arithmetic.precision

    def facts(self) -> dict[str, str | bool | list[str]]:
        """Facts on an opened model for records: ``model``, ``model_spec``, ``engine``, ``precision``, ``dtype``,
        ``quant``, ``device`` (its type: ``cpu``, ``cuda``), ``products`` (what linear layers multiply in) and
        ``kernels`` (whether fused kernels run), ``notes`` (what a reader should know of this model), in this order."""
        return {
            "model": self.name,
            "model_spec": self.spec,
            "engine": self.engine.name,
            "precision": self.precision,
            "dtype": self.dtype,
            "quant": self.quant,
            "device": self.backbone.device.type,
            **self.backbone.arithmetic.facts(),
            "notes": list(self.arch.notes),
        }


def open_model(
    name: str,
    spec: str = "auto",
    *,
    revision: str = "",
    device: str = "auto",
    dtype: str = "auto",
    quant: str = "none",
    offload: str = "auto",
    precision: Precision = "exact",
    trust_remote_code: bool = False,
    findings: Findings | None = None,
) -> LanguageModel:
    """Open ``name`` (``demo``, a folder, a cached or hub model) and choose its engine, or take the choice from
    ``findings``.

    Raises InputError for a model, spec, device or dtype that does not fit, RunError if relfv would misread its logits.
    """
    started = time.monotonic()
    # Code that comes with a checkpoint may come from anywhere.
    before = None if findings is None or trust_remote_code else files_state(name, revision)
    with at_work(f"opening {name}", "reading tokenizer and weights", unit="MiB"):
        checkpoint = load_checkpoint(
            name,
            spec,
            revision=revision,
            device=device,
            dtype=dtype,
            quant=quant,
            offload=offload,
            exact=precision == "exact",
            trust_remote_code=trust_remote_code,
            meanwhile=first_use,
        )
    if before is None:
        return _with_engine(name, spec, checkpoint, quant, precision, started)
    files = files_state(name, revision)
    if not before.items() <= files.items():  # replaced while they were read
        findings = None
    asked = {"model": model_identity(name, revision), "files": files, "spec": spec, "dtype": dtype, "quant": quant}
    return _with_engine(name, spec, checkpoint, quant, precision, started, findings, asked)


def open_given(
    given: GivenModel, spec: str = "auto", *, quant: str = "none", precision: Precision = "exact"
) -> LanguageModel:
    """Choose the engine for a model that is open already, where it is and in its dtype; call within ``borrowed``."""
    return _with_engine(given.name, spec, given.checkpoint(spec), quant, precision, time.monotonic())


def _with_engine(
    name: str,
    spec: str,
    checkpoint: Checkpoint,
    quant: str,
    precision: Precision,
    started: float,
    findings: Findings | None = None,
    asked: Mapping[str, Any] = MappingProxyType({}),
) -> LanguageModel:
    """Choose the engine for ``checkpoint``, or take the choice from ``findings``; ``asked`` says what the files are and
    how they were read, which a finding rests on."""
    if checkpoint.dtype == "float64":
        raise InputError(
            f"{name}: its weights are float64; expected float32, bfloat16 or float16: use dtype float32, and of a "
            "model that is open already its .float()"
        )
    arch, tokens, read_s = checkpoint.arch, checkpoint.tokens, time.monotonic() - started
    arithmetic = Arithmetic.with_kernels(checkpoint.model, arch, precision)
    backbone = Backbone(checkpoint.model, arch, checkpoint.device, arithmetic, checkpoint.streaming, checkpoint.cards)
    prompts = tokens.self_check_prompts(context_of(checkpoint.model.config).limit)
    with at_work(f"opening {name}", "self-check: patches by the engine and by plain hooks"):
        if findings is None:
            engine, check = choose_engine(backbone, prompts)
        else:
            engine, check = remembered(backbone, prompts, findings, asked)
    log.info(
        "opened %s: %s, %d layers x %d heads of %d, residual %d, %s on %s, %s arithmetic, %.1f s, weights %.1f s of it",
        name,
        type(checkpoint.model).__name__,
        arch.n_layers,
        arch.n_heads,
        arch.head_dim,
        arch.resid_dim,
        checkpoint.dtype if quant == "none" else quant,
        backbone.device,
        precision,
        time.monotonic() - started,
        read_s,
    )
    log.info("self-check: %s engine; %s", engine.name, check.said)
    if not check.knows_writing:
        log.warning(
            "no vector as written: what happens to attention's output on its way into the stream is not known here"
        )
    return LanguageModel(name, spec, engine.backbone, tokens, engine, check, checkpoint.dtype, quant)
