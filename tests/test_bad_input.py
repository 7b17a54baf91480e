"""Every row of docs/bad_input.md: one line, the right exit code, and a folder of results that is left as it was."""

from __future__ import annotations

import json
import re
import shutil
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bad_input import ACCEPTED, CSV_ROWS, FAILED_ROWS, FLAG_ROWS, GOOD, HEADER, MODEL_ROWS, RUN, Row, page, remote_code
from conftest import ROOT, make_tokenizer
from relfv.cli import main
from relfv.errors import InputError
from relfv.relations import load_relations, require_q_ids


class Given:
    """A command line in a folder of its own, with what a row says is wrong with it."""

    def __init__(self, row: Row, flags: tuple[str, ...], llama_path: Path, folder: Path) -> None:
        self.csv, self.out, self.model = folder / row.csv_name, folder / "out", llama_path
        if isinstance(row.csv, (str, bytes)):
            self.csv.write_bytes(row.csv if isinstance(row.csv, bytes) else row.csv.encode())
        elif row.csv is not None:
            row.csv(self.csv)
        if row.model:
            self.model = folder / "model"
            shutil.copytree(llama_path, self.model)
            row.model(self.model)
        self.places = {"$CSV": str(self.csv), "$MODEL": str(self.model), "$OUT": str(self.out)}
        self.arguments = [
            re.sub(r"\$(CSV|MODEL|OUT)", lambda m: self.places[m[0]], part) for part in (*row.command, *flags)
        ]

    def expected(self, says: str) -> re.Pattern[str]:
        """What the row says, with the places that were given."""
        parts = re.split(r"(\$CSV|\$MODEL|\$OUT|…)", says)
        return re.compile("".join(".*" if part == "…" else re.escape(self.places.get(part, part)) for part in parts))

    def run(self) -> int:
        try:
            return main(self.arguments)
        except SystemExit as ending:
            return int(ending.code or 0)


def cases(rows: list[Row]) -> list[object]:
    return [
        pytest.param(row, flags, id=f"{row.wrong}{' ' + ' '.join(flags)[:40].encode('unicode_escape').decode() if any(flags) else ''}")  # noqa: E501
        for row in rows
        for flags in row.flags
    ]  # fmt: skip


def said_lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Lines of stderr without their time."""
    text = capsys.readouterr().err
    assert "Traceback" not in text
    lines = text.splitlines()
    assert all(line.isprintable() for line in lines)
    return [re.sub(r"^\S+ \d\d:\d\d:\d\d ", "", line) for line in lines]


@pytest.mark.parametrize(("row", "flags"), cases([*CSV_ROWS, *FLAG_ROWS, *MODEL_ROWS]))
def test_it_is_said_in_one_line_and_nothing_is_left_behind(
    row: Row, flags: tuple[str, ...], llama_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = Given(row, flags, llama_path, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert given.run() == row.code
    lines = said_lines(capsys)
    (error,) = [line for line in lines if "ERROR" in line or "error:" in line]
    assert error == lines[-1]
    assert given.expected(row.says).fullmatch(error.removeprefix("ERROR: ")), error
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("row", "flags"), cases(FAILED_ROWS))
def test_what_only_a_q_id_shows_is_its_failure_and_no_other_file_of_it_is_written(
    row: Row, flags: tuple[str, ...], llama_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = Given(row, flags, llama_path, tmp_path)
    assert given.run() == row.code
    assert any(given.expected(row.says).fullmatch(line.partition("ERROR: ")[2]) for line in said_lines(capsys))
    artifacts = given.out / "pairs/A1/artifacts"
    assert [path.name for path in artifacts.iterdir()] == ["qid_status.json"]
    status = json.loads((artifacts / "qid_status.json").read_text())
    assert status["status"] == "failed"
    assert given.expected(row.says).fullmatch(f"A1 failed: {status['reason']}")


@pytest.mark.parametrize(
    "flags",
    [
        ("--device", "tpu"),
        ("--quant", "8bit", "--offload", "cpu"),
        ("--topk", "100"),
        ("--model_spec", "gpt2"),
        ("--q_list", "A1,Z9"),
    ],
    ids=" ".join,
)
def test_a_refused_force_leaves_every_result_where_it_is(
    flags: tuple[str, ...], finished: Path, llama_path: Path, csv_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def state() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in finished.parent.rglob("*")}

    before = state()
    arguments = ["--relation_csv_path", str(csv_path), "--model", str(llama_path), "--out_root", str(finished.parent)]
    assert main(["run", *arguments, "--force", *flags]) == 2
    assert state() == before


def test_what_was_said_while_the_model_was_opened_is_in_the_runs_log(finished: Path) -> None:
    text = (finished / "run.log").read_text()
    assert text.index("2 q_ids to run") < text.index("opened ") < text.index("A1 stepD_trials")


@pytest.mark.parametrize(("what", "csv", "pairs"), ACCEPTED, ids=[what for what, *_ in ACCEPTED])
def test_what_looks_odd_is_read_all_the_same(
    what: str, csv: str | bytes, pairs: dict[str, list[tuple[str, str]]], tmp_path: Path
) -> None:
    path = tmp_path / "pairs.csv"
    path.write_bytes(csv if isinstance(csv, bytes) else csv.encode())
    found = load_relations(path)
    assert {q_id: [(p.input, p.output) for p in relation.pairs] for q_id, relation in found.items()} == pairs


def test_a_large_file_is_refused_without_reading_it_all(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    with path.open("wb") as file:
        file.truncate(1 << 30)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="1073741824 bytes"):
            load_relations(path)
        assert tracemalloc.get_traced_memory()[1] < 200 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_a_hundred_thousand_rows_load_and_as_many_bad_ones_are_one_short_line(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text(HEADER + "".join(f"Q{i % 100},in{i},out{i}\n" for i in range(100_000)))
    assert sum(len(relation.pairs) for relation in load_relations(path).values()) == 100_000
    path.write_text(HEADER + "".join(f"Q{i},in{i}\n" for i in range(100_000)))
    with pytest.raises(InputError, match=r"100000 problem\(s\)") as caught:
        load_relations(path)
    assert len(str(caught.value)) < 500 + len(str(path))


def test_of_many_q_ids_some_are_named_and_the_others_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text(HEADER + "".join(f"Q{i},a,b\n" for i in range(5000)))
    assert main(["run", "--relation_csv_path", str(path), "--q_list", "Z", "--out_root", str(tmp_path / "out")]) == 2
    assert "Q19, and 4980 more" in capsys.readouterr().err


def _without_bos(folder: Path) -> None:
    make_tokenizer(bos=False).save_pretrained(folder)


def _slow_tokenizer(folder: Path) -> None:
    from transformers import ByT5Tokenizer

    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    ByT5Tokenizer().save_pretrained(folder)


def _bin_of_tensors(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("change", [_without_bos, _slow_tokenizer, _bin_of_tensors])
def test_odd_models_work(change, llama_path: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    given = Given(Row("", "", model=change), (), llama_path, tmp_path)
    assert given.run() == 0
    status = json.loads((given.out / "pairs/A1/artifacts/qid_status.json").read_text())
    assert status["status"] == "completed"


@pytest.mark.slow
def test_code_of_a_model_runs_when_it_is_trusted_and_at_no_other_time(
    llama_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = Given(Row("", "", model=remote_code), (), llama_path, tmp_path)
    given.run()
    given.arguments.append("--no-trust_remote_code")
    given.run()
    assert not (given.model / "OWNED").exists()
    given.arguments.append("--trust_remote_code")
    assert given.run() == 0
    assert (given.model / "OWNED").exists()


def test_a_command_line_of_the_table_that_has_nothing_wrong_runs(llama_path: Path, tmp_path: Path) -> None:
    """Or else every row could be refused for the same reason."""
    given = Given(Row("", "", csv=GOOD, command=(*RUN, "--dry_run")), (), llama_path, tmp_path)
    assert given.run() == 0


def test_the_page_is_the_list(pytestconfig: pytest.Config) -> None:
    path = ROOT / "docs/bad_input.md"
    _, chapter, rest = path.read_text().partition("## Fuzzing\n") if path.exists() else ("", "## Fuzzing\n", "")
    wanted = page() + "\n" + chapter + rest
    if pytestconfig.getoption("--write-bad-input"):
        path.write_text(wanted)
    assert path.read_text() == wanted, "pytest tests/test_bad_input.py --write-bad-input writes it anew"


def test_a_file_of_bad_rows_does_not_fill_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text(HEADER + "Q,\n" * 250_000)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=r"250000 problem\(s\)"):
            load_relations(path)
        assert tracemalloc.get_traced_memory()[1] < 80 << 20  # 64 MiB of buffer, and less than 64 bytes a row
    finally:
        tracemalloc.stop()


def test_q_ids_are_looked_up_and_not_searched_for(tmp_path: Path) -> None:
    compared = 0

    class Counted(str):
        __slots__ = ()
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return str.__eq__(self, other)

    wanted = [Counted(f"Q{i}") for i in range(1000)]
    require_q_ids(wanted, [f"Q{i}" for i in range(1000)], "--q_list", tmp_path)
    assert compared < 10_000
