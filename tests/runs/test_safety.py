"""What SECURITY.md promises: nothing that relfv reads is run, steers a terminal, or is written anywhere but where it
seems."""

from __future__ import annotations

import ast
import contextlib
import csv
import json
import logging
import os
import shutil
import stat
from html.parser import HTMLParser
from pathlib import Path

import pytest

from bad_input import GOOD
from conftest import ROOT
from folders import status, write_status
from relfv.cli import main
from relfv.errors import RunError
from relfv.logs import set_up_logging
from relfv.report.page import write_report
from relfv.stages.trials import read_trials
from relfv.store.status import read_status

SOURCES = sorted(path for folder in ("src", "scripts", "bench") for path in (ROOT / folder).rglob("*.py"))
RUNS_CODE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "eval", "exec"}


def finds_nothing_but_what_it_names(tree: ast.Module) -> bool:
    """True if pickle is there for one thing: a subclass of Unpickler whose find_class calls nothing, and so imports
    nothing, and ends by refusing."""
    uses = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle"]
    classes = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and [ast.unparse(base) for base in node.bases] == ["pickle.Unpickler"]
    ]
    if {node.attr for node in uses} != {"Unpickler", "UnpicklingError"}:
        return False
    if len(classes) != 1 or sum(node.attr == "Unpickler" for node in uses) != 1:
        return False
    found = [node for node in classes[0].body if isinstance(node, ast.FunctionDef) and node.name == "find_class"]
    if len(found) != 1 or not isinstance(found[0].body[-1], ast.Raise):
        return False
    called = {ast.unparse(node.func) for node in ast.walk(found[0]) if isinstance(node, ast.Call)}
    return called == {"pickle.UnpicklingError"}


def unsafe(source: str) -> list[str]:
    """Calls and imports by which data could become code, with their lines."""
    found, tree = [], ast.parse(source)
    for node in ast.walk(tree):
        if ast.unparse(node) == "import pickle" and finds_nothing_but_what_it_names(tree):
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            names = {part for name in [module, *(a.name for a in node.names)] for part in name.split(".")}
            found += [f"{node.lineno}: import {name}" for name in names & RUNS_CODE]
            if module == "torch" and "load" in {a.name for a in node.names}:
                found.append(f"{node.lineno}: from torch import load")
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {key.arg: key.value for key in node.keywords}
        if called in RUNS_CODE or called == "os.system":
            found.append(f"{node.lineno}: {called}")
        is_true = {name for name, value in given.items() if isinstance(value, ast.Constant) and value.value is True}
        if called == "torch.load" and "weights_only" not in is_true:
            found.append(f"{node.lineno}: torch.load without weights_only=True")
        found += [f"{node.lineno}: {flag}=True" for flag in is_true & {"shell", "allow_pickle", "trust_remote_code"}]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_file_turns_data_into_code(path: Path) -> None:
    assert unsafe(path.read_text()) == []


@pytest.mark.parametrize(
    "line",
    ["torch.load(p)", "torch.load(p, weights_only=False)", "torch.load(p, weights_only=w)", "from torch import load",
     "import pickle", "from pickle import loads", "eval(x)", "run(x, shell=True)", "np.load(p, allow_pickle=True)"],
)  # fmt: skip
def test_the_check_of_the_source_files_sees_what_it_is_for(line: str) -> None:
    assert unsafe(line)
    assert not unsafe("torch.load(path, map_location='cpu', weights_only=True)")


@pytest.mark.parametrize(
    ("what", "instead"),
    [
        ('raise pickle.UnpicklingError(f"{module}.{name}")', "return super().find_class(module, name)"),
        ('raise pickle.UnpicklingError(f"{module}.{name}")', "raise pickle.UnpicklingError(getattr(module, name))"),
        ("def find_class(", "def find_a_class("),
        ("class _Unpickler(pickle.Unpickler):", "class _Unpickler(pickle._Unpickler):"),
        ("class _Unpickler(pickle.Unpickler):", "class A(pickle.Unpickler): ...\nclass _Unpickler(pickle.Unpickler):"),
        ("import pickle\n", "import pickle\nx = pickle.loads(b'')\n"),
        ("import pickle\n", "import pickle\nx = pickle.Unpickler(y)\n"),
        ("import pickle\n", "import pickle\nfrom pickle import loads\n"),
        ("import pickle\n", "import pickle as p\n"),
    ],
)  # fmt: skip
def test_the_reader_of_tensors_is_the_one_use_of_pickle_and_would_be_seen_to_find_more(what: str, instead: str) -> None:
    source = (ROOT / "src/relfv/store/formats.py").read_text()
    assert [path for path in SOURCES if "import pickle" in path.read_text()] == [ROOT / "src/relfv/store/formats.py"]
    assert not unsafe(source)
    assert what in source
    assert unsafe(source.replace(what, instead))


HOSTILE = ["\u202egnp.exe", "\u2066x\u200b", "=1+1", "+1", "@SUM(A1)", "-2", "</script><script>alert(1)</script>", '" onmouseover="alert(1)', "' onload='x", "<img src=x onerror=y>", "{{ 7*7 }}", "%s%n", "$\\frac$"]  # fmt: skip  # noqa: E501


@pytest.fixture(scope="session")
def hostile(llama_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, under umask 027, whose words are hostile on both sides; all answers begin with one token."""
    folder = tmp_path_factory.mktemp("hostile")
    with (folder / "pairs.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("id", "ex_A", "ex_B"), *(("A1", word, f"pup {word}") for word in HOSTILE)])
    before = os.umask(0o027)
    try:
        arguments = ["--relation_csv_path", str(folder / "pairs.csv"), "--model", str(llama_path)]
        assert main(["run", *arguments, "--out_root", str(folder / "out")]) == 0
    finally:
        os.umask(before)
    return folder / "out/pairs"


def test_words_in_logs_cannot_steer_a_terminal(hostile: Path) -> None:
    for log in (hostile / "run.log", hostile / "A1/logs/stepD_aie.log"):
        text = log.read_text()
        assert "answers are told by the same token" in text  # so words stand in it
        assert "\\u202e" in text
        assert all(line.isprintable() for line in text.splitlines())


def test_a_folder_name_is_no_formula_of_a_figure(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / r"$\frac$" / "artifacts"
    folder.mkdir(parents=True)
    shutil.copy(finished / "A1/artifacts/aie_scores.csv", folder)
    assert main(["heatmap", "--in_dir", str(folder)]) == 0


@pytest.mark.parametrize(
    "arguments", [["run", "--no\x1b[2J\u202esuch"], ["run", "--relation_csv_path", "\x1b[2J\u202ex\ny.csv", "--debug"]]
)
def test_neither_errors_nor_tracebacks_can_steer_a_terminal(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    with contextlib.suppress(SystemExit):
        main(arguments)
    text = capsys.readouterr().err
    assert "\\x1b[2J\\u202e" in text
    assert all(line.isprintable() for line in text.split("\n"))


def test_an_exception_of_a_library_is_escaped_line_by_line(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging(debug=True)
    try:
        raise ValueError("a\x9b31m\u202eb")
    except ValueError:
        logging.getLogger("relfv.cli").debug("traceback", exc_info=True)
    text = capsys.readouterr().err
    assert text.count("\n") > 3
    assert "a\\x9b31m\\u202eb" in text
    assert all(line.isprintable() for line in text.split("\n"))


def test_tables_on_the_terminal_are_escaped(
    finished: Path, tmp_path: Path, llama_path: Path, csv_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "out\u202e" / "pairs"
    shutil.copytree(finished, copy)
    write_status(copy, "C3", {**status(copy, "C3"), "reason": "\x1b[2Jgone\u202e"})
    assert main(["status", str(copy)]) == 0
    arguments = ["--relation_csv_path", str(csv_path), "--model", str(llama_path), "--out_root", str(copy.parent)]
    assert main(["run", *arguments, "--dry_run"]) == 0
    text = capsys.readouterr().out
    assert "\\x1b[2Jgone\\u202e" in text
    assert all(line.isprintable() for line in text.split("\n"))


def test_no_cell_of_a_csv_is_a_formula_and_numbers_are_numbers(hostile: Path) -> None:
    files = sorted(hostile.rglob("*.csv"))
    tables = {"answers.csv", "controls.csv", "heads.csv", "layers.csv", "summary.csv"}
    assert {path.name for path in files} == {"aie_scores.csv", "cie_scores.csv", *tables}
    for path in files:
        for row in csv.DictReader(path.open(newline="")):
            for name, cell in row.items():
                try:
                    float(cell)
                except ValueError:  # words, of which a table has some; the scores have none but the q_id
                    assert path.name in tables or name == "q_id"
                    assert cell[:1] not in ("=", "+", "-", "@", "\t", "\r")


class Tags(HTMLParser):
    """Elements of a page with their attributes' names."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple[str, ...]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, tuple(name for name, _ in attrs)))


def test_hostile_words_make_no_element_and_no_attribute(hostile: Path, tmp_path: Path) -> None:
    copy = tmp_path / "pairs"
    shutil.copytree(hostile, copy)
    path = copy / "A1/artifacts/sampled_trials.json"
    path.chmod(0o644)
    document = json.loads(path.read_text())
    pages = []
    for word in ["plain", *HOSTILE]:
        document["trials"][0]["query"] = {"input": word, "output": word}
        path.write_text(json.dumps(document))
        pages.append(Tags(write_report(copy).read_text()).found)
    assert all(page == pages[0] for page in pages)
    assert ("bdi", ()) in pages[0]  # a word that turns the direction of writing does so to itself alone
    found = status(copy, "A1")
    found["config"]["model"] = "".join(HOSTILE)
    write_status(copy, "A1", found)
    assert Tags(write_report(copy).read_text()).found == pages[0]


def test_everything_that_is_written_keeps_to_the_umask(hostile: Path) -> None:
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in [hostile, *hostile.rglob("*")]}
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o750}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o640, 0o440}


def files_below(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "place",
    ["pairs", "pairs/A1", "pairs/.locks", "pairs/report", "pairs/tables", "pairs/A1/artifacts", "pairs/A1/logs",
     "pairs/A1/artifacts/stepD_mean_acts", "pairs/A1/artifacts/step6/layer_1"],
)  # fmt: skip
@pytest.mark.parametrize("more", [(), ("--force",)], ids=["run", "force"])
def test_a_linked_folder_leads_no_write_outside(
    place: str, more: tuple[str, ...], llama_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outside, link = tmp_path / "outside", tmp_path / "out" / place
    outside.mkdir()
    link.parent.mkdir(parents=True)
    link.symlink_to(outside, target_is_directory=True)
    (tmp_path / "pairs.csv").write_text(GOOD)
    arguments = ["--relation_csv_path", str(tmp_path / "pairs.csv"), "--model", str(llama_path)]
    assert main(["run", *arguments, "--out_root", str(tmp_path / "out"), *more]) == 2
    said = capsys.readouterr().err
    assert f"{link}: is a symbolic link (to {outside})" in said
    assert list(outside.iterdir()) == []
    assert link.is_symlink()


@pytest.mark.parametrize("place", ["pairs/run.log", "pairs/.locks/A1.lock", "pairs/A1/logs/stepD_aie.log"])
def test_a_linked_file_is_not_written_through(place: str, llama_path: Path, tmp_path: Path) -> None:
    outside, link = tmp_path / "precious", tmp_path / "out" / place
    outside.write_text("precious")
    link.parent.mkdir(parents=True)
    link.symlink_to(outside)
    (tmp_path / "pairs.csv").write_text(GOOD)
    arguments = ["--relation_csv_path", str(tmp_path / "pairs.csv"), "--model", str(llama_path)]
    assert main(["run", *arguments, "--out_root", str(tmp_path / "out")]) == 2
    base = str(link.parents[len(Path(place).parts) - 2] / "A1")
    assert main(["stepd", *arguments, "--relation_q_list", "A1", "--out_base_dir", base]) == (
        0 if "run.log" in place else 2
    )
    assert outside.read_text() == "precious"


def test_an_out_root_that_is_a_link_is_the_users_choice(llama_path: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk", target_is_directory=True)
    (tmp_path / "pairs.csv").write_text(GOOD)
    arguments = ["--relation_csv_path", str(tmp_path / "pairs.csv"), "--model", str(llama_path)]
    assert main(["run", *arguments, "--out_root", str(tmp_path / "out")]) == 0
    assert (tmp_path / "disk/pairs/A1/artifacts/qid_status.json").exists()


@pytest.mark.parametrize("q_id", ["../../../x", "/x", "..", 7, None])
def test_a_q_id_in_a_results_file_is_no_path_either(finished: Path, tmp_path: Path, q_id: object) -> None:
    shutil.copytree(finished / "A1/artifacts", tmp_path / "artifacts")
    for name, read in (("qid_status.json", lambda p: read_status(p.parent)), ("sampled_trials.json", read_trials)):
        path = tmp_path / "artifacts" / name
        document = json.loads(path.read_text())
        (document["trials"][0] if "trials" in document else document)["q_id"] = q_id
        path.chmod(0o644)
        path.write_text(json.dumps(document))
        with pytest.raises(RunError):
            read(path)
    assert main(["heatmap", "--in_dir", str(tmp_path / "artifacts")]) == 1
    assert files_below(tmp_path).keys() == {tmp_path / "artifacts" / p.relative_to(finished / "A1/artifacts") for p in files_below(finished / "A1/artifacts")}  # fmt: skip  # noqa: E501
