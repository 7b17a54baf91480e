"""``relfv doctor``, and ``relfv run --dry_run``: what a run would do, what it would refuse, and what its relations, its
tokenizer and its model forbid to conclude. Nothing is written, and what takes seconds comes last.

A dry run reads no weights. The doctor opens the model and measures one q_id on it (estimate.py).
"""

from __future__ import annotations

import json
import shutil
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from relfv.errors import InputError, RelfvError
from relfv.logs import printable, show
from relfv.models.memory import available_bytes
from relfv.progress import duration
from relfv.runs.checks import Evidence, Level, Line, check_bos, check_relations
from relfv.runs.plan import RunPlan, RunRequest, chosen_relations, make_plan
from relfv.runs.qid import open_for
from relfv.runs.rehearsal import (
    REFUSED,
    SKIPPED,
    more_on_a_card,
    needs_a_model,
    outline_for,
    stages_to_run,
    what_would_happen,
)
from relfv.runs.reuse import require_reusable
from relfv.stages.zeroshot import evaluated_of
from relfv.store.files import require_temporary_folder

if TYPE_CHECKING:
    from relfv.language_model import LanguageModel
    from relfv.models.outline import Outline
    from relfv.runs.estimate import Estimate

_ITEM_BYTES = {"float32": 4.0, "8bit": 1.0, "4bit": 0.5}
_WIDEST_NAME = len("answers of an input")


def doctor(request: RunRequest, *, as_json: bool) -> int:
    """Check everything and measure; show a line for each check, or one JSON document. Returns the exit code: 1 if the
    run would be refused, or a q_id of it would fail."""
    visit = _Visit(request, aloud=not as_json)
    visit.examine(measuring=True)
    if as_json:
        show(json.dumps(visit.document(), indent=2, ensure_ascii=False))
    return 1 if visit.failed else 0


def rehearse(request: RunRequest) -> int:
    """Check everything without opening the model (``--dry_run``). Returns 1 if the run would refuse a q_id.

    Raises InputError where it would not even begin, as the run itself does.
    """
    visit = _Visit(request, aloud=True)
    visit.examine(measuring=False)
    if visit.problem:
        raise visit.problem
    return 1 if visit.failed else 0


class _Visit:
    """The checks of one request, and what they have found so far."""

    def __init__(self, request: RunRequest, *, aloud: bool) -> None:
        self._request, self._aloud, self._began = request, aloud, time.monotonic()
        self.failed = False
        """Whether the run would be refused, or a q_id of it would fail."""
        self.lines: list[Line] = []
        self.problem: InputError | None = None
        """The first error that would stop the run before it begins."""
        self._plan: RunPlan | None = None
        self._evidence: list[Evidence] = []
        self._would: dict[str, str] = {}
        self._estimate: Estimate | None = None

    def document(self) -> dict[str, Any]:
        """The document that ``--json`` prints."""
        return {
            "refused": self.failed,
            "checks": [asdict(line) for line in self.lines],
            "q_ids": self._would,
            "estimate": self._estimate and asdict(self._estimate),
        }

    def examine(self, *, measuring: bool) -> None:
        """Check the CSV first, then the tokenizer, then the model's config, then, if ``measuring``, its weights."""
        with self._caught("relations"):
            relations = chosen_relations(self._request)
            n_rows = sum(len(relation.pairs) for relation in relations.values())
            self._say(
                "relations", f"{len(relations)} q_ids, {n_rows} rows in {self._request.settings.relation_csv_path}"
            )
            self._evidence = [Evidence(relation, self._request.settings) for relation in relations.values()]
        self._look("rows")
        if self.problem is None:
            with self._caught("model"):
                plan = make_plan(self._request)
                plan.require_no_links()
                self._plan = plan
        if self._plan is None:
            return
        self._of_plan(self._plan)
        todo = [q_id for q_id, said in self._would.items() if needs_a_model(said)]
        if not todo:  # a run would not open the model either
            return
        with self._caught("tokenizer"):
            self._of_tokenizer(self._plan)
        with self._caught("model"):
            outline = outline_for(self._plan.request)
            self._of_outline(self._plan, outline)
            if more := more_on_a_card(self._plan.request, outline, len(todo)):
                self._say("processes", more)
        with self._caught("temporary files"):
            require_temporary_folder()
        if measuring and not self.failed:
            self._measure(self._plan, [of for of in self._evidence if of.relation.q_id in todo])
        else:
            self._disk(self._plan)

    def _of_plan(self, plan: RunPlan) -> None:
        settings = plan.request.settings
        self._say("model", f"{settings.model} ({plan.model_identity[:40]})")
        for departure in settings.departures():
            self._say("spec", f"departs from the spec: {departure}", "nothing, if that is meant", "warn")
        if len(devices := plan.request.devices) > 1:
            self._say("processes", f"{len(devices)}, on {', '.join(devices)}")
        if plan.written:
            self._say("plan", plan.written.in_words())
        with self._caught("--reuse_stepd"):
            require_reusable(plan)
        self._would = {q_id: what_would_happen(plan, q_id) for q_id in plan.relations}
        self._say("output", str(plan.folder))
        for q_id, said in self._would.items():
            level = "fail" if said.startswith(REFUSED) else "warn" if said.startswith(SKIPPED) else "pass"
            self.failed |= level == "fail"
            if self._aloud:  # one line, however long, so that programs can read it
                show(printable(f"{level}  {q_id:<8} {len(plan.relations[q_id].pairs):>4} rows  {said}"))

    def _of_tokenizer(self, plan: RunPlan) -> None:
        from relfv.models.opening import load_tokenizer

        settings = plan.request.settings
        tokens = load_tokenizer(settings.model, settings.revision, trust_remote_code=settings.trust_remote_code)
        for of in self._evidence:
            of.settings, of.tokens = settings, tokens
        self._add(check_bos(tokens))
        self._look("tokenizer")

    def _of_outline(self, plan: RunPlan, outline: Outline | None) -> None:
        if outline is None:
            self._say("architecture", "only its weights can tell")
            return
        arch, settings = outline.arch, plan.request.settings
        if plan.written:
            plan.written.require_layers(arch.n_layers)
        n_with_heads = len(arch.out_projs)
        some = "" if n_with_heads == arch.n_layers else f" ({n_with_heads} of them with attention)"
        self._say(
            "architecture",
            f"family {arch.family}, {arch.n_layers} layers{some} x {arch.n_heads} heads of {arch.head_dim}, residual "
            f"{arch.resid_dim}",
        )
        for note in arch.notes:
            self._say("family", note, level="warn")
        for of in self._evidence:
            of.context = outline.context
        self._look("config")
        stored = settings.quant if settings.quant != "none" else settings.dtype
        taken = outline.packed_bytes or outline.n_parameters * _ITEM_BYTES.get(stored, 2.0)
        form = outline.stored if outline.packed_bytes else f"in {stored}"
        more = [outline.stored if form != outline.stored else "", str(outline.placement or "")]
        said = "; ".join([f"{outline.n_parameters / 1e6:,.1f} million, {_gb(taken)} {form}", *filter(None, more)])
        self._say("weights", said)

    def _measure(self, plan: RunPlan, todo: list[Evidence]) -> None:
        from relfv.runs.estimate import estimate

        n_eval = {
            of.relation.q_id: len(evaluated_of(of.trials, of.settings).questions)
            for of in todo
            if of.trials is not None
        }
        stages = {q_id: stages_to_run(plan, q_id) for q_id in n_eval}
        free = available_bytes()
        with self._caught("model"):
            model = open_for(plan.request.settings)
            self._of_model(model)
            if n_eval:
                self._estimate = found = estimate(plan, model, n_eval, stages, time.monotonic() - self._began)
                self._of_estimate(plan, model, found, free)

    def _of_model(self, model: LanguageModel) -> None:
        facts = model.facts()
        level: Level = "pass" if model.engine.name == "shared_prefix" else "warn"
        slow = "" if level == "pass" else "nothing: the reference engine is right as well, and many times slower"
        self._say(
            "engine", f"{model.engine.name} on {model.backbone.device}; self-check: {model.check.said}", slow, level
        )
        kernels = "with" if facts["kernels"] else "without"
        self._say("arithmetic", f"{model.precision}: multiplies in {facts['products']}, {kernels} fused kernels")

    def _of_estimate(self, plan: RunPlan, model: LanguageModel, of: Estimate, free: int | None) -> None:
        n, all_trials = of.measured.n_trials, plan.request.settings.n_trials_per_q
        self._say(
            "time",
            f"about {duration(of.seconds)}: {duration(of.seconds_opening)} until the model is open, "
            f"{duration(of.seconds_per_q_id)} a q_id (measured on {of.q_id} with {n} of {all_trials} trials)",
        )
        limit = of.device_bytes or free
        tight = limit is not None and of.peak_bytes > 0.95 * limit
        self._say(
            "memory",
            f"about {_gb(of.peak_bytes)} of {model.backbone.device.type} memory"
            + (f"; {_gb(limit)} {'in all' if of.device_bytes else 'free'}" if limit else ""),
            "--precision fast, --dtype bf16 or --quant 4bit; what does not fit is computed in smaller parts"
            if tight
            else "",
            "warn" if tight else "pass",
        )
        self._disk(plan, of)

    def _disk(self, plan: RunPlan, of: Estimate | None = None) -> None:
        there = next(folder for folder in (plan.folder.absolute(), *plan.folder.absolute().parents) if folder.is_dir())
        free = shutil.disk_usage(there).free
        needed = f"about {_gb(of.disk_bytes)} in {of.n_files} files; " if of else ""
        full = of is not None and of.disk_bytes > free
        remedy = "free space, or use another --out_root" if full else ""
        self._say("disk", f"{needed}{_gb(free)} free", remedy, "fail" if full else "pass")

    # --- how it is said ---

    def _look(self, having: str) -> None:
        for line in check_relations(self._evidence, having) if self._evidence else ():
            self._add(line)

    @contextmanager
    def _caught(self, check: str) -> Iterator[None]:
        """Report an error that stops the run as a line like any other."""
        try:
            yield
        except RelfvError as problem:
            if self.problem is None and isinstance(problem, InputError):
                self.problem = problem
            self._say(check, str(problem), level="fail")

    def _say(self, check: str, found: str, remedy: str = "", level: Level = "pass") -> None:
        self._add(Line(check, level, found, remedy))

    def _add(self, line: Line) -> None:
        self.lines.append(line)
        self.failed |= line.level == "fail"
        if self._aloud:
            show(_as_text(line))


def _as_text(line: Line) -> str:
    width = max(60, shutil.get_terminal_size().columns)
    name = f"{line.level}  {printable(line.check)}"
    indent = " " * (6 + _WIDEST_NAME + 2)
    remedy = f" -> {line.remedy}" if line.remedy else ""
    words = printable(line.found + remedy)
    return textwrap.fill(
        words, width, initial_indent=name.ljust(len(indent)), subsequent_indent=indent, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip


def _gb(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:.1f} MB"
