from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from conftest import make_tokenizer
from folders import arguments, contents, rewrite, status
from relfv.cli import main
from relfv.models.tokens import Tokens
from relfv.stages.vector_file import PART, VECTOR, frame_of, read_vector_file, spaces_of
from relfv.store.safetensors import safetensors_bytes
from relfv.types import Question, Target, WordPair


def question(word: str, *spaces: int) -> Question:
    return Question("A1", "t", 0, WordPair(word, "x"), 0, "x", Target((5,), True, tuple(spaces)))


def test_the_file_says_all_that_its_use_takes(finished: Path) -> None:
    artifacts = finished / "A1/artifacts"
    arrays, metadata = read_vector_file(artifacts / "function_vector.safetensors")
    assert {"kind", "relfv_version", "q_id", "model", "model_identity", "layer", "alpha", "heads", "prompt_format"} <= (
        metadata.keys()
    )
    assert metadata["token_position_rule"].startswith("last prompt token; the prompt is fed without a trailing space")
    assert all(np.isfinite(array).all() and array.shape == arrays[VECTOR].shape for array in arrays.values())
    recorded = status(finished, "A1")["stages"]["vector_file"]["files"]
    assert list(recorded) == ["function_vector.safetensors"]


def test_a_prompts_frame_is_what_all_prompts_share() -> None:
    tokens = Tokens(make_tokenizer())
    begin, end = frame_of(tokens, [question("dog"), question("cat")])
    for word in ("dog", "swan", "9"):
        ids = tokens.encode(f"Q: {word}\nA:")
        assert ids[: len(begin)] == begin
        assert ids[-len(end) :] == end
    assert begin[0] == 0
    assert tokens.joined(end).endswith("A:")


def test_spaces_that_are_fed_are_kept_with_their_exceptions() -> None:
    assert spaces_of([question("a", 7), question("b", 7), question("c")]) == {"": [7], "c": []}
    _, end = frame_of(Tokens(make_tokenizer()), [question("a", 7), question("b", 7)])
    assert end[-1] == 7


def test_verify_sees_another_vector_than_the_specs(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:  # type: ignore[type-arg]
    relation = Path(shutil.copytree(finished, tmp_path / "pairs"))

    def change(path: Path) -> None:
        arrays, metadata = read_vector_file(path)
        arrays |= {VECTOR: 2 * arrays[VECTOR], f"{PART}9": arrays[VECTOR]}
        path.write_bytes(safetensors_bytes(arrays, {**metadata, "layer": "9"}))

    rewrite(relation / "A1/artifacts", "function_vector.safetensors", change)
    assert main(["verify", str(relation)]) == 1
    said = capsys.readouterr().out
    assert "the vector of fv_global_resid.pt" in said
    assert "the parts of fv_by_layer.pt" in said
    assert "the best layer of step6_all_layers_summary.json" in said


def test_folders_of_an_earlier_version_get_the_file(
    finished: Path, llama_path: Path, csv_path: Path, tmp_path: Path
) -> None:
    from folders import write_status

    relation = Path(shutil.copytree(finished, tmp_path / "pairs"))
    whole = contents(relation / "A1/artifacts")
    document = status(relation, "A1")
    (relation / "A1/artifacts/function_vector.safetensors").unlink()
    del document["stages"]["vector_file"]
    write_status(relation, "A1", document)
    assert main(arguments(llama_path, csv_path, tmp_path, "--q_list", "A1")) == 0
    assert contents(relation / "A1/artifacts") == whole
    assert status(relation, "A1")["stages"]["vector_file"]["status"] == "completed"
