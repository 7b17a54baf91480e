from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import ROOT
from relfv.errors import InputError
from relfv.relations import load_relations, rows_sha256
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


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("id,ex_A,ex_B\n", "no word pairs"),
        ("a,b,c\n1,2,3\n", "0 columns for the q_id"),
        ("id,ex_A\nQ1,a\n", "0 columns for the output"),
        ("id,ex_A,ex_B,input\nQ1,a,b,c\n", "2 columns for the input"),
        ("id,ex_A,ex_B\nQ1,a\n", "line 2: 2 columns, expected 3"),
        ("id,ex_A,ex_B\nQ1,a,b,c\n", "line 2: 4 columns, expected 3"),
        ("id,ex_A,ex_B\nQ1,a,b\nQ1, ,b\n", "line 3: the input of Q1 is blank"),
        ('id,ex_A,ex_B\nQ1,"a\nb",c\n', "line break or control character"),
        ("id,ex_A,ex_B\n../x,a,b\n", "cannot be a folder name"),
        ("id,ex_A,ex_B\n.git,a,b\n", "cannot be a folder name"),
        ("id,ex_A,ex_B\n/tmp/x,a,b\n", "cannot be a folder name"),
        (f"id,ex_A,ex_B\n{'q' * 65},a,b\n", "cannot be a folder name"),
        ("id,ex_A,ex_B\nQ1,a,b\nq1,c,d\n", "differ only in case"),
        ("id,ex_A,ex_B\nreport,a,b\n", "line 2: q_id 'report' is a name that relfv gives"),
        ("id,ex_A,ex_B\nQ1.replaced-x,a,b\n", "is a name that relfv gives"),
        (b"id,ex_A,ex_B\nQ1,a,\xff\n", "line 2: not UTF-8"),
        (b"id,ex_A,ex_B\nQ1,a,\0\n", "line 2: contains a NUL byte"),
        ('id,ex_A,ex_B\nQ1,"a,b\n', "not readable as CSV"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(tmp_path: Path, text: str | bytes, words: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(InputError) as caught:
        load_relations(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


def test_all_bad_rows_are_reported_at_once_ten_and_a_count(tmp_path: Path) -> None:
    path = write(tmp_path, "id,ex_A,ex_B\n" + "Q1,a\n" * 13)
    with pytest.raises(InputError, match=r"13 problem\(s\): line 2, 3, .*, 11: 2 columns, expected 3.*; and 3 more"):
        load_relations(path)


@pytest.mark.parametrize("name", ["missing.csv", "."])
def test_a_missing_file_and_a_folder_are_bad_input(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="relation CSV"):
        load_relations(tmp_path / name)


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_no_bytes_whatever_do_anything_but_load_or_be_refused(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "x.csv"
    path.write_bytes(b"id,ex_A,ex_B\n" + data)
    try:
        relations = load_relations(path)
    except InputError:
        return
    assert all(pair.input and pair.output for relation in relations.values() for pair in relation.pairs)


def test_the_hash_of_a_relation_depends_on_its_own_rows_alone(tmp_path: Path) -> None:
    one = load_relations(write(tmp_path, "id,ex_A,ex_B\nQ1,a,b\nQ2,c,d\n"))["Q1"]
    other = load_relations(write(tmp_path, "id,ex_A,ex_B\nQ2,e,f\nQ1,a,b\nQ3,g,h\n"))["Q1"]
    assert rows_sha256(one) == rows_sha256(other)
    assert rows_sha256(Relation("Q1", (WordPair("ab", "c"),))) != rows_sha256(Relation("Q1", (WordPair("a", "bc"),)))


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
