"""``relfv.run``: all stages of every relation, on a model by name or one that is already open."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from relfv.api.results import Run
from relfv.errors import InputError, UsageWarning
from relfv.models.given import GivenModel, borrowed
from relfv.relations import relation_name
from relfv.settings import DEFAULT_OUT_ROOT, FLAGS, MOST_PER_CARD, Settings, require_within
from relfv.store.files import move_aside, write_atomic


def run(
    relations: Any,
    model: Any,
    tokenizer: Any = None,
    *,
    out_root: str | Path | None = DEFAULT_OUT_ROOT,
    q_list: str | Sequence[str] | None = None,
    name: str = "relations",
    force: bool = False,
    devices: str | Sequence[str] = (),
    per_card: int = 1,
    plan: str | Path | None = None,
    **settings: Any,
) -> Run:
    """Run every stage of every relation, as ``relfv run`` does, and carry on where an earlier call was stopped.

    ``relations``: the path of a CSV, or a DataFrame, with columns ``id, ex_A, ex_B``; a DataFrame is kept as
    ``<out_root>/<name>.csv``. ``model``: ``demo``, a folder, a hub id, or a transformers model with its ``tokenizer``,
    which is used where it is and handed back as it came: in its dtype and mode, without a hook. Results go to
    ``<out_root>/<name of the CSV>``; with ``out_root=None`` to a temporary folder that is removed with the result.
    ``q_list``: some q_ids alone, as a list or ``"Q1,Q2"``. ``force``: move earlier results aside. ``devices``: share
    the q_ids out to a process on each, such as ``["cuda:0", "cuda:1"]`` or ``"all"``, and ``per_card``: to so many on
    each of them, or on the one ``device`` (neither with a model that is open here). ``plan``: a JSON file of what is to
    be shown, registered before anything is computed. ``settings``: any flag of ``relfv run``, such as ``topk=10``;
    ``model_spec`` is ``auto`` by default.

    A q_id that fails does not stop the others; it is warned of, and ``summary()`` has the reason. Raises InputError
    before anything is computed if it cannot be run so.
    """
    from relfv.runs.plan import RunRequest, devices_from
    from relfv.runs.run import run_all

    require_within("per_card", per_card, 1, MOST_PER_CARD)
    given = None if isinstance(model, str | Path) else GivenModel(model, tokenizer)
    flags = {field for field, flag in FLAGS.items() if "run" in flag.commands} - {"model", "relation_csv_path"}
    chosen = settings_from(settings, flags, model=given.name if given else str(model))
    keeps = tempfile.TemporaryDirectory(prefix="relfv-") if out_root is None else None
    root = Path(keeps.name if keeps else out_root or "")
    csv_path = _csv_path(relations, root, name)
    named = _named_for_the_user(csv_path) if keeps and csv_path.parent == root else nullcontext()
    request = RunRequest(
        replace(chosen, relation_csv_path=str(csv_path)),
        None if q_list is None else _q_ids(q_list),
        root,
        force=force,
        devices=devices_from(devices) if isinstance(devices, str) else tuple(devices),
        per_card=per_card,
        given=given,
        plan=None if plan is None else Path(plan),
    )
    with named, _lines_of_the_log(), borrowed(model) if given else nullcontext():
        failed = run_all(request)
    result = Run(root / relation_name(csv_path), keeps)
    if failed:
        warnings.warn("some q_ids failed; summary() says which and why", UsageWarning, stacklevel=2)
    return result


def _q_ids(given: str | Sequence[str]) -> tuple[str, ...]:
    return tuple(q_id.strip() for q_id in given.split(",")) if isinstance(given, str) else tuple(given)


def settings_from(given: dict[str, Any], known: Collection[str], *, model: str) -> Settings:
    """Make settings from values by name, of those that are ``known``. Raises InputError for any other."""
    for name in given:
        if name not in known:
            raise InputError(f"{name}=...: is no setting here; expected one of {', '.join(sorted(known))}")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return Settings(**{"model_spec": "auto", **values, "model": model})


def _csv_path(relations: Any, root: Path, name: str) -> Path:
    if isinstance(relations, str | Path):
        return Path(relations)
    if not hasattr(relations, "to_csv"):
        raise InputError(
            f"relations is a {type(relations).__name__}; expected the path of a CSV, or a DataFrame, with columns "
            "id, ex_A, ex_B"
        )
    path, data = root / f"{name}.csv", relations.to_csv(index=False).encode()
    if path.exists() and path.read_bytes() != data:
        move_aside(path)
    return write_atomic(path, data)


@contextmanager
def _named_for_the_user(csv_path: Path) -> Iterator[None]:
    """While open, let errors call a temporary ``csv_path`` what the caller passed."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error).replace(str(csv_path), "relations (as a CSV)")) from error


@contextmanager
def _lines_of_the_log() -> Iterator[None]:
    """While open, let log files have lines of level INFO even where the program has asked for warnings alone."""
    logger = logging.getLogger("relfv")
    before = logger.level
    if logger.getEffectiveLevel() > logging.INFO:
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(before)
