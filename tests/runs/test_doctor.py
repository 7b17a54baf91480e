"""``relfv doctor``: what it says, what it would refuse, and that it leaves nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT
from folders import arguments
from relfv.cli import main


def doctor(llama_path: Path, csv_path: Path, out: Path, *more: str) -> list[str]:
    return ["doctor", *arguments(llama_path, csv_path, out, *more)[1:]]


def said_in_json(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out)


def test_it_says_what_a_run_would_do_and_need_and_writes_nothing(
    llama_path: Path, csv_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(doctor(llama_path, csv_path, tmp_path / "out", "--json", "--k_sweep", "3")) == 0
    assert list(tmp_path.iterdir()) == []
    document = said_in_json(capsys)
    assert document["refused"] is False
    assert document["q_ids"]["A1"] == document["q_ids"]["B2"] == "run (new)"
    assert document["q_ids"]["C3"].startswith("skip: 9 rows")
    line = {line["check"]: line for line in document["checks"]}
    assert line["architecture"]["found"] == "family llama3, 3 layers x 8 heads of 10, residual 48"
    assert line["engine"]["found"].startswith("shared_prefix on cpu; self-check: agrees with plain hooks")
    assert line["arithmetic"]["found"] == "exact: multiplies in float32, without fused kernels"
    found = document["estimate"]
    assert 2 <= found["measured"]["n_trials"] <= 25  # as many as there was time for
    assert "step6_sweeps" in found["measured"]["seconds"]
    assert found["seconds"] > found["seconds_opening"] > 0
    assert found["peak_bytes"] > 0


def test_the_files_it_foretells_are_those_that_a_run_writes(
    finished: Path, llama_path: Path, csv_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(doctor(llama_path, csv_path, tmp_path, "--json")) == 0
    found = said_in_json(capsys)["estimate"]
    written = [path for q_id in ("A1", "B2") for path in (finished / q_id).rglob("*") if path.is_file()]
    assert found["n_files"] == len(written)
    assert found["disk_bytes"] == pytest.approx(sum(path.stat().st_size for path in written), rel=0.3)


def test_a_dry_run_says_the_same_but_for_what_is_measured(
    llama_path: Path, csv_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(llama_path, csv_path, tmp_path / "out", "--dry_run")) == 0
    dry = capsys.readouterr().out.splitlines()
    assert main(doctor(llama_path, csv_path, tmp_path / "out")) == 0
    whole = capsys.readouterr().out.splitlines()
    of_disk = next(i for i, line in enumerate(dry) if "  disk " in line)
    assert whole[:of_disk] == dry[:of_disk]
    assert {line.split()[1] for line in whole[of_disk:] if line[:1] != " "} == {
        "engine", "arithmetic", "time", "memory", "disk",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--k_sweep", "500"), "--k_sweep 500: "),
        (("--device", "bogus"), "--device 'bogus': not a device"),
        (("--q_list", "Z9"), "Z9 not in"),
        (("--model", "/nowhere"), "no such folder"),
    ],
)
def test_what_the_run_would_refuse_is_a_line_and_exit_code_1(
    flags: tuple[str, ...], says: str, llama_path: Path, csv_path: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert main(doctor(llama_path, csv_path, tmp_path / "out", "--json", *flags)) == 1
    document = said_in_json(capsys)
    assert any(says in line["found"] for line in document["checks"] if line["level"] == "fail")
    assert document["estimate"] is None


def test_formats_are_looked_at_as_a_run_reads_them(
    llama_path: Path, csv_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = arguments(llama_path, csv_path, tmp_path / "out", "--q_list", "A1,C3", "--dry_run", "--formats")
    assert main([*command, "arrow,colon"]) == 0
    assert "warn  C3" in capsys.readouterr().out  # it will be skipped
    assert main([*command, "arow"]) != 0
    said = "".join(capsys.readouterr())
    assert "--formats 'arow': expected one of" in said
    assert "JSONDecodeError" not in said


def test_relations_are_looked_at_even_where_the_model_is_not_there(
    csv_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(doctor(Path("/nowhere"), csv_path, tmp_path, "--json")) == 1
    checks = {line["check"]: line["level"] for line in said_in_json(capsys)["checks"]}
    assert checks == {
        "relations": "pass", "rows": "warn", "answers of a row": "pass", "answers of an input": "pass", "model": "fail",
    }  # fmt: skip


def test_results_of_another_experiment_are_refused_and_a_finished_one_has_nothing_to_do(
    finished: Path, llama_path: Path, csv_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(doctor(llama_path, csv_path, finished.parent, "--seed", "5")) == 1
    assert "refuse: seed was 0, now 5" in capsys.readouterr().out
    assert main(doctor(llama_path, csv_path, finished.parent)) == 0
    said = capsys.readouterr()
    assert said.out.count("completed, nothing to do") == 2
    assert "opened" not in said.err


def test_what_is_there_already_costs_nothing(
    finished: Path, llama_path: Path, csv_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def n_bytes(out: Path, *more: str) -> int:
        assert main(doctor(llama_path, csv_path, out, *more, "--json", "--q_list", "A1")) == 0
        return said_in_json(capsys)["estimate"]["disk_bytes"]

    whole, without = (n_bytes(tmp_path, *more) for more in ((), ("--reuse_stepd", str(finished.parent))))
    assert 0 < n_bytes(finished.parent, "--k_sweep", "3") < without < whole


def test_a_run_that_asks_for_too_many_heads_is_refused_before_weights_are_read(
    llama_path: Path, csv_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    model = Path(shutil.copytree(llama_path, tmp_path / "model"))
    (model / "model.safetensors").write_bytes(b"")
    assert main(arguments(model, csv_path, tmp_path / "out", "--k_sweep", "500")) == 2
    assert "--k_sweep 500: " in capsys.readouterr().err


# --- a gated model ---


class _Gate(BaseHTTPRequestHandler):
    """Answers as the hub does for a model that asks for a login."""

    def do_HEAD(self) -> None:
        self.send_response(403)
        self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("X-Error-Message", "Access to model someone/gated is restricted.")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def gated_hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Gate)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.slow
def test_a_gated_model_without_a_token_is_one_clear_line(gated_hub: str, csv_path: Path, tmp_path: Path) -> None:
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": gated_hub, "HF_HOME": str(tmp_path / "hf"),
        "no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1", "PYTHONPATH": str(ROOT / "src"),
    }  # fmt: skip
    command = [sys.executable, "-m", "relfv", *arguments(Path("someone/gated"), csv_path, tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2
    assert "--model 'someone/gated': is a gated model" in line
    assert "https://huggingface.co/someone/gated" in line
    assert "hf auth login" in line
