"""Files of other projects become a relation CSV that ``relfv run`` takes, with an account of what was done."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relfv.cli import main
from relfv.importing.cleaning import cleaned, q_ids_for
from relfv.importing.formats import Found
from relfv.relations import is_q_id, load_relations

TODD = json.dumps(
    [{"output": "Kabul", "input": "Afghanistan"}, {"output": ["Pretoria", "Cape Town"], "input": " South Africa"}]
)
LRE = json.dumps(
    {"name": "person father", "properties": {"symmetric": False},
     "samples": [{"subject": "Zeus", "object": "Kronos"}, {"subject": "Nobody", "object": None}]}
)  # fmt: skip
GOOGLE = """: capital-common
Athens Greece Baghdad Iraq
Athens Greece Bern Switzerland

: gram1-adverb
amazing amazingly calm calmly
odd line
"""
BATS = "sofa\tsofas\nfox\tvixen/foxess\n"


def imported(tmp_path: Path, files: dict[str, str], *flags: str) -> tuple[list[dict[str, str]], dict]:
    folder, out = tmp_path / "theirs", tmp_path / "mine.csv"
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    assert main(["import", str(folder), "--out", str(out), *flags]) == 0
    load_relations(out)
    return list(csv.DictReader(out.open(newline=""))), json.loads((tmp_path / "mine.csv.import.json").read_text())


def pairs_of(rows: list[dict[str, str]]) -> dict[str, list[tuple[str, str]]]:
    pairs: dict[str, list[tuple[str, str]]] = {}
    for row in rows:
        pairs.setdefault(row["id"], []).append((row["ex_A"], row["ex_B"]))
    return pairs


def test_every_published_format_is_told_by_its_content(tmp_path: Path) -> None:
    files = {
        "abstractive/country-capital.json": TODD,
        "factual/person_father.json": LRE,
        "questions-words.txt": GOOGLE,
        "2_D/D01 [noun - plural_reg].txt": BATS,
        "own.csv": "id;ex_A;ex_B\nmine;dog;puppy\n",
        "notes.txt": "some words in a line\n",
    }
    rows, account = imported(tmp_path, files)
    assert pairs_of(rows) == {
        "D01_noun_plural_reg": [("sofa", "sofas"), ("fox", "vixen"), ("fox", "foxess")],
        "country_capital": [("Afghanistan", "Kabul"), ("South Africa", "Pretoria"), ("South Africa", "Cape Town")],
        "person_father": [("Zeus", "Kronos")],
        "mine": [("dog", "puppy")],
        "capital_common": [("Athens", "Greece"), ("Baghdad", "Iraq"), ("Bern", "Switzerland")],
        "gram1_adverb": [("amazing", "amazingly"), ("calm", "calmly")],
    }
    assert {row["id"]: row["name"] for row in rows}["D01_noun_plural_reg"] == "noun - plural_reg"
    assert {source["path"]: source["format"] for source in account["sources"]} == {
        "2_D/D01 [noun - plural_reg].txt": "bats", "abstractive/country-capital.json": "todd", "own.csv": "csv",
        "factual/person_father.json": "lre", "questions-words.txt": "google",
    }  # fmt: skip
    assert account["not_read"] == ["notes.txt: is in none of the formats"]
    assert "NC" in next(source["licence"] for source in account["sources"] if source["format"] == "bats")
    by_q_id = {relation["q_id"]: relation for relation in account["relations"]}
    assert by_q_id["gram1_adverb"]["dropped"]["no word pair"]["examples"] == ["line 7 has 2 words, not 4"]
    assert by_q_id["person_father"]["dropped"]["no word pair"]["n"] == 1
    assert by_q_id["country_capital"]["inputs_with_several_right_answers"] == 1
    assert by_q_id["country_capital"]["changed"]["outer spaces taken off"]["n"] == 1


def test_line_breaks_become_spaces_and_are_counted(tmp_path: Path) -> None:
    text = "id,ex_A,ex_B\n" + "".join(f'long,"first {i}\nsecond",a{i}\n' for i in range(12))
    rows, account = imported(tmp_path, {"long.csv": text})
    assert rows[3] == {"id": "long", "ex_A": "first 3 second", "ex_B": "a3", "name": "long"}
    (kind,) = account["relations"][0]["changed"]
    assert "line break" in kind
    assert account["relations"][0]["changed"][kind]["n"] == 12


def test_alternatives_are_parted_where_asked(tmp_path: Path) -> None:
    text = "id,ex_A,ex_B\nhome,fox,den/earth\nhome,bird,nest\nhome,bird,nest\n"
    rows, account = imported(tmp_path, {"home.csv": text}, "--alternatives", "/")
    assert pairs_of(rows) == {"home": [("fox", "den"), ("fox", "earth"), ("bird", "nest")]}
    assert account["relations"][0]["dropped"] == {"repeated pair": {"n": 1, "examples": ["bird -> nest"]}}


def test_a_slash_is_a_letter_where_nobody_said_otherwise(tmp_path: Path) -> None:
    rows, _ = imported(tmp_path, {"home.csv": "id,ex_A,ex_B\nhome,fox,den/earth\n"})
    assert pairs_of(rows) == {"home": [("fox", "den/earth")]}


def test_nothing_there_already_is_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    imported(tmp_path, {"home.csv": "id,ex_A,ex_B\nhome,fox,den\n"})
    again = ["import", str(tmp_path / "theirs"), "--out", str(tmp_path / "mine.csv")]
    assert main(again) == 0  # the same bytes
    (tmp_path / "theirs" / "home.csv").write_text("id,ex_A,ex_B\nhome,fox,earth\n")
    before = (tmp_path / "mine.csv").read_bytes()
    assert main(again) == 2
    assert "is there already, with other content" in capsys.readouterr().err
    assert (tmp_path / "mine.csv").read_bytes() == before


@pytest.mark.parametrize("text", ["", "[1, 2]", "{}", "a sentence of five words\n", "[" * 5000])
def test_what_is_in_no_format_is_refused_by_name(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.json").write_text(text)
    assert main(["import", str(tmp_path / "x.json"), "--out", str(tmp_path / "mine.csv")]) == 2
    assert "x.json: is in none of the formats" in capsys.readouterr().err
    assert not (tmp_path / "mine.csv").exists()


@given(st.lists(st.text(max_size=70), max_size=8))
def test_every_key_gets_a_q_id_of_its_own(keys: list[str]) -> None:
    q_ids = q_ids_for(keys)
    assert all(map(is_q_id, q_ids))
    assert len({q_id.lower() for q_id in q_ids}) == len(keys)


@given(st.lists(st.tuples(st.text(max_size=12), st.lists(st.text(max_size=12), min_size=1, max_size=3)), max_size=6))
def test_whatever_the_words_are_the_csv_can_be_run(tmp_path_factory: pytest.TempPathFactory, pairs: list) -> None:
    path = tmp_path_factory.mktemp("any") / "x.json"
    path.write_text(json.dumps([{"input": a, "output": b} for a, b in pairs] or [{"input": "a", "output": "b"}]))
    out = path.with_name("out.csv")
    code = main(["import", str(path), "--out", str(out)])
    its = cleaned(Found("x", "x", tuple((a, tuple(b)) for a, b in pairs)), "")
    if code == 0 and pairs:
        relation = load_relations(out)["x"]
        assert [(pair.input, pair.output) for pair in relation.pairs] == [*its.rows]
