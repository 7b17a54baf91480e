from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from relfv.errors import RunError
from relfv.store.files import (
    make_folders,
    read_bytes,
    remove_temporaries,
    sha256_file,
    write_atomic,
    write_together,
)
from relfv.store.pieces import write_in_pieces


def test_a_file_is_replaced_whole_and_leaves_no_temporary(tmp_path: Path) -> None:
    path = tmp_path / "deep/er/file.txt"
    write_atomic(path, b"one")
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_the_umask_decides_who_may_read_it(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomic(tmp_path / "a", b"")
        write_atomic(tmp_path / "b", b"", read_only=True)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "b").stat().st_mode) == 0o440


def test_what_cannot_be_written_is_one_error_and_leaves_the_old_file(tmp_path: Path) -> None:
    write_atomic(tmp_path / "x", b"old")
    with pytest.raises(RunError, match="cannot be written"):
        write_atomic(tmp_path / "x" / "y", b"new")
    assert (tmp_path / "x").read_bytes() == b"old"


def test_files_that_are_written_together_are_each_whole_or_the_old_one(tmp_path: Path) -> None:
    folder = tmp_path / "new/folder"
    paths = [folder / name for name in ("a", "b", "c")]
    assert write_together(dict.fromkeys(paths, b"old")) == paths
    paths[1].unlink()
    paths[1].mkdir()
    (paths[1] / "in the way").touch()
    with pytest.raises(RunError, match=r"folder/b: cannot be written"):
        write_together(dict.fromkeys(paths, b"new"))
    assert paths[0].read_bytes() == b"new"
    assert paths[2].read_bytes() == b"old"
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b", "c"]


def test_everything_is_synced_before_a_write_returns_and_content_before_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen from outside: which files and folders fsync was called for, and what the folder held then."""
    seen: list[tuple[str, list[str]]] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        folder = path if path.is_dir() else path.parent
        seen.append((path.name, sorted(item.name for item in folder.iterdir() if not item.name.startswith("."))))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    write_together({tmp_path / "new" / name: b"" for name in ("a", "b")})
    assert [(name if name == "new" else "file" if ".tmp" in name else "parent", held) for name, held in seen] == [
        ("parent", ["new"]),
        ("file", []),
        ("file", []),  # before the first name is there
        ("new", ["a", "b"]),
    ]
    seen.clear()
    make_folders(tmp_path / "step6" / name for name in ("a", "b"))
    assert seen == [(tmp_path.name, ["new", "step6"]), ("step6", ["a", "b"])]


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/.relfv-123-abc.tmp").write_text("half")
    (tmp_path / "a/.mine.tmp").write_text("the user's own")
    remove_temporaries(tmp_path)
    assert [p.name for p in (tmp_path / "a").iterdir()] == [".mine.tmp"]


def test_only_a_regular_file_is_read_and_nothing_waits_for_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(5 << 30)
    for name, words in (
        ("pipe", "not a regular file"),
        ("link", "not a regular file"),
        ("folder", "Is a directory"),
        ("huge", "File too large"),
        ("nothing", "No such file"),
    ):
        with pytest.raises(OSError, match=words):
            read_bytes(tmp_path / name)
        assert sha256_file(tmp_path / name) is None
    (tmp_path / "file").write_bytes(b"x")
    assert read_bytes(tmp_path / "file") == b"x"


def test_files_written_in_pieces_appear_together_and_whole_or_not_at_all(tmp_path: Path) -> None:
    paths = [tmp_path / "tables" / name for name in ("a.csv", "b.csv")]
    with write_in_pieces(paths) as files:
        for number in range(3):
            for file in files:
                file.write(b"%d\n" % number)
        assert not any(path.exists() for path in paths)
    assert [path.read_bytes() for path in paths] == [b"0\n1\n2\n"] * 2
    assert [file.sha256 for file in files] == [sha256_file(path) for path in paths]
    with pytest.raises(ZeroDivisionError), write_in_pieces(paths) as files:
        files[0].write(b"%d" % (1 // 0))
    assert [path.read_bytes() for path in paths] == [b"0\n1\n2\n"] * 2
    assert sorted(path.name for path in paths[0].parent.iterdir()) == ["a.csv", "b.csv"]


def test_an_interrupted_rename_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace, interrupts = Path.replace, [InterruptedError()]

    def interrupted(path: Path, target: Path) -> Path:
        if interrupts:
            raise interrupts.pop()
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    assert write_atomic(tmp_path / "a", b"new").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_that_cannot_be_made_is_one_line_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "step6").write_text("a file")
    with pytest.raises(RunError, match=r"step6: cannot be written \(.*; a file is in the way"):
        make_folders([tmp_path / "step6" / "layer_0", tmp_path / "step6" / "layer_1"])
