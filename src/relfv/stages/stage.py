"""The classes of a stage: its declaration (``Stage``), its steps (``Step``), and the q_id it works on (``Work``).

Order, resume, which settings may still be chosen, what ``relfv verify`` checks and what the documentation lists all
follow from the declarations: a ``Stage`` names the files it reads and writes, the settings it uses, and how to run it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from relfv.pace import Pace
from relfv.settings import Settings
from relfv.stages.prompts import prompts_to_read
from relfv.store.folder import File, QidFolder
from relfv.store.status import QidStatus
from relfv.types import Prompts, Relation, Snapshot

if TYPE_CHECKING:
    from relfv.language_model import LanguageModel


class MadeInPasses(Protocol):
    """A result that says how many prompts shared a forward pass when it was made."""

    @property
    def per_pass(self) -> int: ...


T = TypeVar("T")
Made = TypeVar("Made", bound=MadeInPasses)


@dataclass
class Work:
    """A q_id while its stages run: its folder, its settings, the model, and what its stages share."""

    folder: QidFolder
    settings: Settings
    opened: Callable[[], LanguageModel]
    """Function that gives the model; it is not called before a stage asks for the model."""
    layers: Sequence[int] = ()
    """All layers of the model."""
    trials_per_pass: MutableMapping[str, int] = field(default_factory=dict)
    """Kind of pass -> number of prompts that shared a forward pass. Batch shapes change low-order bits, so a pass that
    is repeated takes the number that it was first made with (``repeatable``)."""
    relation: Relation | None = None
    """The rows that trials are drawn from; only the stage that freezes the trials needs them."""
    csv_sha256: str = ""
    model_identity: str = ""
    """Identity of the model in the fingerprint; empty where there is no fingerprint."""
    name: str = ""
    """The relation in words; empty where the CSV has none."""
    pace: Pace = field(default_factory=lambda: Pace(1))
    """Estimate of the time left; it is told which stage runs."""
    meanwhile: Callable[[], None] = lambda: None
    """Function with work that others left for later. A stage calls it once while a GPU computes for long and the host
    would wait."""
    _made: dict[Callable[..., Any], Any] = field(default_factory=dict, repr=False)

    @property
    def model(self) -> LanguageModel:
        """The model, opened when first asked for."""
        return self.once(_opened)

    @property
    def q_id(self) -> str:
        """The q_id of ``folder``."""
        return self.folder.q_id

    def once(self, make: Callable[[Work], T]) -> T:
        """The result of ``make(self)``, made when first asked for and then shared by several stages."""
        if make not in self._made:
            self._made[make] = make(self)
        return self._made[make]

    def repeatable(self, a_pass: str, run: Callable[..., Made], *args: Any) -> Made:
        """The result of ``run(*args)``, with as many prompts a pass as this kind of pass was first made with."""
        made = run(*args, per_pass=self.trials_per_pass.get(a_pass))
        self.trials_per_pass[a_pass] = made.per_pass
        return made

    def read(self, file: File[T], layer: int | None = None) -> T:
        """The content of one of the q_id's files."""
        return self.folder.read(file, layer)

    def write(self, file: File[T], data: bytes, *, content: T | None = None) -> None:
        """Write one of the q_id's files; ``content`` is what its reader makes of ``data``, where that is at hand."""
        self.folder.write(file, data, content=content)

    def tokenised(self, snapshot: Snapshot, *, clean: bool = False) -> Prompts:
        """A snapshot's prompts, or its clean ones, as token ids with their targets and queries."""
        texts, questions = snapshot.clean_prompts if clean else snapshot.prompts, snapshot.questions
        targets, right = [question.target for question in questions], [question.right_ids for question in questions]
        prompts = prompts_to_read(texts, targets, self.model.tokens, snapshot.clusters, right)
        self.model.context.require_room(
            max(len(ids) + t.n_to_come for ids, t in zip(prompts.ids, targets, strict=True))
        )
        return prompts


def _opened(work: Work) -> LanguageModel:
    return work.opened()


@dataclass(frozen=True)
class Check:
    """A check of something that two files of a finished q_id should agree on."""

    path: Path
    """The file to name if they do not agree."""
    expected: str
    holds: bool


@dataclass(frozen=True)
class Stage:
    """Declaration of a stage, which every q_id, or every layer of every q_id, goes through."""

    name: str
    """Name of the stage in qid_status.json; for a stage with a step for each layer, without the layer's number."""
    about: str
    """Description of the stage in one line."""
    run: Callable[..., str]
    """Called with a Work, and the layer where each layer has a step; reads, computes, writes, and returns its result in
    a few words for the log."""
    reads: tuple[File[Any], ...] = ()
    writes: tuple[File[Any], ...] = ()
    settings: tuple[str, ...] = ()
    """The fields of Settings that the stage itself uses. Those of the stages whose files it reads count as its own,
    too."""
    agrees: Callable[[QidFolder, QidStatus], Iterator[Check]] | None = None
    """Checks for ``relfv verify``: what the stage's files must agree on, with other files and with the q_id's
    status."""
    per_layer: bool = False
    """Whether each layer has a step of its own."""
    asked: Callable[[Settings], Any] | None = None
    """Part of the settings that asks for the stage, falsy where none does; None for a stage without which no q_id is
    complete."""
    extra: bool = False
    """Whether the stage is beyond the spec, and left out with ``--extras none``."""
    made_for: Callable[[QidFolder, Relation, Settings], bool] | None = None
    """Whether the stage's files were made from the present rows of the CSV's other relations; None for a stage that
    does not read these."""
    prompts: Callable[[Settings], int] | None = None
    """Number of prompts that the stage sweeps over all heads. None: its time grows with the evaluated prompts if it
    reads these, and with the trials if not."""
    share: float = 0.0
    """Share of a q_id's time that this stage usually takes; used for the time left before a stage has been timed."""

    def step(self, layer: int | None = None) -> Step:
        """The stage for one q_id: at ``layer``, if it has a step for each."""
        return Step(self, layer)


@dataclass(frozen=True)
class Step:
    """One entry of qid_status.json: a stage, at one layer where it has a step for each."""

    stage: Stage
    layer: int | None = None

    @property
    def name(self) -> str:
        """Name of the step in qid_status.json: the stage's, followed by the layer where there is one."""
        return self.stage.name if self.layer is None else f"{self.stage.name}{self.layer}"

    def run(self, work: Work) -> str:
        """Run the stage for this step. -> its result in a few words."""
        return self.stage.run(work) if self.layer is None else self.stage.run(work, self.layer)

    def inputs(self, folder: QidFolder, layers: Sequence[int]) -> list[Path]:
        """The existing files that the step reads, in the order of their declaration; of files that each layer has,
        all."""
        return [path for path in self._paths(self.stage.reads, folder, layers) if path.exists()]

    def outputs(self, folder: QidFolder, layers: Sequence[int]) -> list[Path]:
        """The existing files that the step writes, in the same order; of files that each layer has, those of its own
        layer, if it has one."""
        at = layers if self.layer is None else [self.layer]
        return [path for path in self._paths(self.stage.writes, folder, at) if path.exists()]

    def has_all(self, names: Sequence[str], q_id: str) -> bool:
        """Whether ``names``, relative to ``artifacts/``, hold every file that the stage writes today: one that a later
        version adds is missing in the record of an earlier one."""
        return all(any(file.is_named(name, q_id) for name in names) for file in self.stage.writes)

    @staticmethod
    def _paths(files: Sequence[File[Any]], folder: QidFolder, layers: Sequence[int]) -> list[Path]:
        paths = [folder.path(file) for file in files if not file.per_layer]
        return paths + [folder.path(file, layer) for layer in layers for file in files if file.per_layer]
