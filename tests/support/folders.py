"""What tests of whole runs share: their command line, and what a results folder holds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from relfv.store.formats import SEAL, sealed_bytes


def contents(artifacts: Path) -> dict[str, bytes]:
    """Every file but the status, which holds times."""
    return {
        str(path.relative_to(artifacts)): path.read_bytes()
        for path in sorted(artifacts.rglob("*"))
        if path.is_file() and path.name != "qid_status.json"
    }


def status(folder: Path, q_id: str) -> dict:  # type: ignore[type-arg]
    return json.loads((folder / q_id / "artifacts/qid_status.json").read_text())


def sealed(content: dict) -> dict:  # type: ignore[type-arg]
    """With the hash of itself that relfv would give it."""
    return json.loads(sealed_bytes(content))


def write_status(folder: Path, q_id: str, document: dict) -> None:  # type: ignore[type-arg]
    """A status with other content, as if relfv itself had written it."""
    rest = {key: value for key, value in document.items() if key != SEAL}
    (folder / q_id / "artifacts/qid_status.json").write_text(json.dumps(sealed(rest)))


def arguments(llama_path: Path, csv_path: Path, out: Path, *more: str) -> list[str]:
    return ["run", "--model", str(llama_path), "--relation_csv_path", str(csv_path), "--out_root", str(out), *more]


def rewrite(artifacts: Path, name: str, change: Callable[[Path], None]) -> None:
    """Change a file and every hash of it, as if relfv itself had written it so."""
    path, status_path = artifacts / name, artifacts / "qid_status.json"
    old = hashlib.sha256(path.read_bytes()).hexdigest()
    path.chmod(0o644)
    change(path)
    new = hashlib.sha256(path.read_bytes()).hexdigest()
    document = json.loads(status_path.read_text().replace(old, new))
    write_status(artifacts.parents[1], artifacts.parent.name, document)
