from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from conftest import ROOT
from fuzz.relations_csv import HEADER, SEEDS, as_csv, check
from relfv.relations import csv_file, is_q_id, load_relations, rows_sha256
from relfv.types import Relation, WordPair


def write(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "rel.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    "header", ["id,ex_A,ex_B", "q_id,input,output", "QID,exA,exB", "Q,Input,EX_B", "ex_B,id,ex_A,comment"]
)
def test_every_accepted_header_spelling_reads_the_same(tmp_path: Path, header: str) -> None:
    cells = {"id": "Q1", "a": "dog", "b": "puppy", "comment": "x"}
    order = [
        "id"
        if name.lower() in ("id", "q", "q_id", "qid")
        else "b"
        if name.lower() in ("ex_b", "exb", "output")
        else "a"
        if name.lower() in ("ex_a", "exa", "input")
        else "comment"
        for name in header.split(",")
    ]
    path = write(tmp_path, f"{header}\n{','.join(cells[name] for name in order)}\n")
    assert load_relations(path) == {"Q1": Relation("Q1", (WordPair("dog", "puppy"),))}


def test_bom_crlf_quotes_spaces_blank_lines_and_interleaving(tmp_path: Path) -> None:
    text = '\ufeffid,ex_A,ex_B\r\nQ2, a , b \r\n\r\nQ1,"x, y","say ""hi"""\r\n,,\r\nQ2,c,d\r\nQ1,é,日本\r\n'
    relations = load_relations(write(tmp_path, text))
    assert list(relations) == ["Q2", "Q1"]
    assert relations["Q2"].pairs == (WordPair("a", "b"), WordPair("c", "d"))
    assert relations["Q1"].pairs == (WordPair("x, y", 'say "hi"'), WordPair("é", "日本"))


@given(st.binary(max_size=300))
@example(*SEEDS[:1])
@example(*SEEDS[1:2])
@example(*SEEDS[2:3])
@example(*SEEDS[3:])
@settings(max_examples=300)
def test_any_bytes_whatever_are_read_as_what_they_say_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.csv"
    for content in (data, HEADER + data):
        path.write_bytes(content)
        check(path)


_TRICKY = st.text(st.sampled_from("aQ1,\"'\n\r\t ;=\x00\x1b\x85\u2028\u202e\ufeffé\u0301日"), max_size=6)


@pytest.mark.slow
@given(
    st.lists(st.tuples(st.one_of(_TRICKY, st.sampled_from(["Q1", "q1", "Q2", "con", "..", "-x"])), _TRICKY, _TRICKY))
)
@settings(max_examples=300)
def test_any_rows_that_a_spreadsheet_writes_are_read_as_they_are_or_refused(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str, str]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "rows.csv"
    path.write_bytes(as_csv(rows))
    stripped = [tuple(cell.strip() for cell in row) for row in rows]
    if check(path):
        path.write_bytes(as_csv(rows))
        found = [(q_id, p.input, p.output) for q_id, relation in load_relations(path).items() for p in relation.pairs]
        assert sorted(found) == sorted(row for row in stripped if any(row))


_WORDS = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Zl", "Zp")), min_size=1, max_size=8)
_Q_IDS = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}", fullmatch=True).filter(is_q_id)


@pytest.mark.slow
@given(st.dictionaries(_Q_IDS, st.lists(st.tuples(_WORDS, _WORDS), min_size=1, max_size=4), min_size=1, max_size=4))
@settings(max_examples=200)
def test_what_is_written_is_what_is_read(
    tmp_path_factory: pytest.TempPathFactory, given: dict[str, list[tuple[str, str]]]
) -> None:
    relations = {
        q_id: [(a.strip(), b.strip()) for a, b in pairs]
        for q_id, pairs in {q_id.lower(): pairs for q_id, pairs in given.items()}.items()
    }
    assume(all(word for pairs in relations.values() for pair in pairs for word in pair))
    path = tmp_path_factory.getbasetemp() / "written.csv"
    path.write_bytes(as_csv([(q_id, a, b) for q_id, pairs in relations.items() for a, b in pairs]))
    found = load_relations(path)
    assert {q_id: [(p.input, p.output) for p in relation.pairs] for q_id, relation in found.items()} == relations


def test_the_hash_of_a_relation_depends_on_its_own_rows_alone(tmp_path: Path) -> None:
    one = load_relations(write(tmp_path, "id,ex_A,ex_B\nQ1,a,b\nQ2,c,d\n"))["Q1"]
    other = load_relations(write(tmp_path, "id,ex_A,ex_B\nQ2,e,f\nQ1,a,b\nQ3,g,h\n"))["Q1"]
    assert rows_sha256(one) == rows_sha256(other)
    assert rows_sha256(Relation("Q1", (WordPair("ab", "c"),))) != rows_sha256(Relation("Q1", (WordPair("a", "bc"),)))


def test_where_labels_are_drawn_from_other_relations_the_hash_depends_on_all_answers(tmp_path: Path) -> None:
    one, other, again = (
        load_relations(write(tmp_path, f"id,ex_A,ex_B\nQ1,a,b\n{more}\n"))["Q1"]
        for more in ("Q2,c,d", "Q2,c,e", "Q2,x,d")
    )
    assert rows_sha256(one, "random") == rows_sha256(other, "random") == rows_sha256(one)
    assert rows_sha256(one, "other") not in (rows_sha256(other, "other"), rows_sha256(one))
    assert rows_sha256(one, "other") == rows_sha256(again, "other")  # inputs of others are not drawn


def test_the_shipped_relations_are_as_promised() -> None:
    relations = load_relations(ROOT / "datasets/relation/relationA_ex.csv")
    sizes = [len(relation.pairs) for relation in relations.values()]
    assert sum(size >= 10 for size in sizes) >= 20
    assert sum(size < 10 for size in sizes) == 2
    assert any(" " in pair.output for relation in relations.values() for pair in relation.pairs)
    for relation in relations.values():
        inputs = [pair.input for pair in relation.pairs]
        assert len(set(inputs)) == len(inputs), relation.q_id
    shared = [pair.input for relation in relations.values() for pair in relation.pairs]
    assert len(shared) > 2 * len(set(shared))


def test_the_specs_csv_comes_with_the_package_and_gives_way_to_one_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    spec = "datasets/relation/relationA_ex.csv"
    assert len(load_relations(csv_file(spec))) == 30
    own = tmp_path / spec
    own.parent.mkdir(parents=True)
    own.write_text("id,ex_A,ex_B\nQ1,dog,puppy\n")
    assert list(load_relations(csv_file(spec))) == ["Q1"]
    assert csv_file("no/such.csv") == Path("no/such.csv")
