"""``relfv.run``: all stages of every relation, on a model by name or one that is already open."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from relfv.api.results import Run
from relfv.errors import InputError, UsageWarning
from relfv.logs import told
from relfv.models.given import GivenModel, borrowed, own_defaults
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

    stderr has the lines and the bar of ``relfv run``, unless the program has set up logging: then the logger ``relfv``
    has them.

    A q_id that fails does not stop the others; it is warned of, and ``summary()`` has the reason. Raises InputError
    before anything is computed if it cannot be run so.
    """
    from relfv.runs.plan import RunRequest, devices_from
    from relfv.runs.run import run_all

    require_within("per_card", per_card, 1, MOST_PER_CARD)
    given = None if isinstance(model, str | Path) else GivenModel(model, tokenizer)
    require_no_tokenizer(given, tokenizer)
    flags = {field for field, flag in FLAGS.items() if "run" in flag.commands} - {"model", "relation_csv_path"}
    chosen = settings_from(settings, flags, model=given.name if given else str(model))
    keeps = tempfile.TemporaryDirectory(prefix="relfv-") if out_root is None else None
    root = Path(keeps.name if keeps else out_root or "")
    with _as_csv(relations, root, name) as csv_path:
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
        with told(), borrowed(given.model) if given else own_defaults():
            failed = run_all(request)
    result = Run(root / relation_name(csv_path), keeps)
    if failed:
        warnings.warn("some q_ids failed; summary() says which and why", UsageWarning, stacklevel=2)
    return result


def _q_ids(given: str | Sequence[str]) -> tuple[str, ...]:
    return tuple(q_id.strip() for q_id in given.split(",")) if isinstance(given, str) else tuple(given)


def require_no_tokenizer(given: GivenModel | None, tokenizer: Any) -> None:
    """Raise InputError for a tokenizer beside a model's name, whose own would be used all the same."""
    if given is None and tokenizer is not None:
        raise InputError(
            "tokenizer=...: a model given by its name brings its own; leave it out, or open the model, too"
        )


def settings_from(given: dict[str, Any], known: Collection[str], *, model: str) -> Settings:
    """Make settings from values by name, of those that are ``known``. Raises InputError for any other."""
    for name in given:
        if name not in known:
            raise InputError(f"{name}=...: is no setting here; expected one of {', '.join(sorted(known))}")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return Settings(**{"model_spec": "auto", **values, "model": model})


@contextmanager
def _as_csv(relations: Any, root: Path, name: str) -> Iterator[Path]:
    """The path of a CSV, or of the one that a DataFrame is kept as while open and after it, unless an InputError says
    that nothing came of it: then all is as it was. Such an error calls it what the caller passed."""
    if isinstance(relations, str | Path):
        yield Path(relations)
        return
    if not hasattr(relations, "to_csv"):
        raise InputError(
            f"relations is a {type(relations).__name__}; expected the path of a CSV, or a DataFrame, with columns "
            "id, ex_A, ex_B"
        )
    if Path(name).name != name or name.startswith("."):
        raise InputError(f"name={name!r}: expected the name of a file, without a folder or a dot before it")
    path, data = root / f"{name}.csv", relations.to_csv(index=False).encode()
    is_there = path.exists() and path.read_bytes() == data
    before = None if is_there or not path.exists() else move_aside(path)
    new = [folder for folder in (root, *root.parents) if not folder.exists()]
    if not is_there:
        write_atomic(path, data)
    try:
        yield path
    except InputError as error:
        if before:
            before.replace(path)
        elif not is_there:
            path.unlink()
            for folder in new:
                with suppress(OSError):  # something else is in it by now
                    folder.rmdir()
        raise InputError(str(error).replace(str(path), "relations (as a CSV)")) from error
