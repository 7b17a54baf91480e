"""Coverage-guided fuzzing of the CSV loader: any file whatever is either loaded, and then means what it says, or
refused.

How to run it and what it has found: docs/bad_input.md. ``check`` is what tests/test_relations.py asks of Hypothesis'
files.
"""

from __future__ import annotations

import csv
import io
import sys
import tempfile
import unicodedata
from pathlib import Path

HEADER = b"id,ex_A,ex_B\n"
SEEDS = [
    HEADER + b"Q1,dog,puppy\nQ2,france,paris\nQ1,cat,kitten\n",
    b'\xef\xbb\xbfq_id,output,input,comment\r\nQ1, "b" ,a,x\r\n\r\nQ.2_-,"x, ""y""",\xc3\xa9,\r\n',
    b"EXB,EXA,QID\rb,a,Q1\rd,c,q1\r",
    HEADER + b'../x,a,b\n"Q1\nQ1",a,b\n,,\nQ1,"a\nb",c\nCON,a,b\nreport,a,b\nQ1,,b\nQ1,a\nQ1,"never closed\n',
]
WORDS = ['"', '""', '"\\x0a"', "\\x0d", "\\xef\\xbb\\xbf", "\\xff\\xfe", "\\xc2\\x85", "\\xe2\\x80\\xa8", "\\xe2\\x80\\xae",  # noqa: E501
         "id", "ex_a", "ex_b", "input", "output", "q_id", "nul.txt", "com1", "run.log", ".replaced-", "report", "Q1", "q1"]  # fmt: skip  # noqa: E501


def check(path: Path) -> bool:
    """True if ``path`` loads, False if it is refused as bad input. AssertionError if it is loaded or refused badly."""
    from relfv.errors import InputError
    from relfv.relations import is_q_id, load_relations

    said = ""
    try:
        relations = load_relations(path)
    except InputError as problem:
        relations, said = {}, str(problem)
    if not relations:
        assert str(path) in said
        assert "\n" not in said
        assert len(said) < 4000 + len(str(path))
        return False
    assert len({q_id.casefold() for q_id in relations}) == len(relations)
    for q_id, relation in relations.items():
        assert relation.q_id == q_id
        assert is_q_id(q_id)
        assert relation.pairs
        for word in (word for pair in relation.pairs for word in (pair.input, pair.output)):
            assert word == word.strip() != ""
            assert not any(unicodedata.category(char) in ("Cc", "Zl", "Zp") for char in word)
    path.write_bytes(as_csv([(q_id, p.input, p.output) for q_id, r in relations.items() for p in r.pairs]))
    assert load_relations(path) == relations
    return True


def as_csv(rows: list[tuple[str, str, str]]) -> bytes:
    """A relation CSV with these rows, as a spreadsheet writes it."""
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows([("id", "ex_A", "ex_B"), *rows])
    return buffer.getvalue().encode()


def main() -> None:
    """Fuzz with Atheris (libFuzzer); its options follow on the command line."""
    import atheris  # type: ignore[import-not-found]

    with atheris.instrument_imports(include=["relfv.relations"]):
        import relfv.relations  # noqa: F401

    folder = Path(tempfile.mkdtemp())
    corpus, path = folder / "corpus", folder / "x.csv"
    corpus.mkdir()
    for number, seed in enumerate(SEEDS):
        (corpus / str(number)).write_bytes(seed)
    (folder / "words").write_text("".join(f'"{word}"\n' for word in (w.replace('"', '\\"') for w in WORDS)))
    loaded = [0, 0]

    def one(data: bytes) -> None:
        # Half of all files get a header that is right, without which the rows are never looked at.
        path.write_bytes(HEADER + data[1:] if data[:1] < b"\x80" else data)
        loaded[check(path)] += 1
        if sum(loaded) % 50_000 == 0:
            print(f"{loaded[1]} loaded, {loaded[0]} refused", file=sys.stderr, flush=True)

    atheris.Setup([sys.argv[0], f"-dict={folder / 'words'}", "-max_len=400", *sys.argv[1:], str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
