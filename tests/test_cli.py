from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from relfv import __version__
from relfv.cli import build_parser, main
from relfv.commands.examples import EXAMPLES


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "--no_such_flag"], "unrecognized arguments: --no_such_flag"),
        (["run", "--top", "5"], "unrecognized arguments: --top"),
        (["run", "--topk", "many"], "argument --topk: invalid int value: 'many'"),
        (["nothing"], "invalid choice: 'nothing'"),
        (["stepd"], "the following arguments are required"),
        (["stauts"], "; did you mean status? (see relfv --help)"),
        (
            ["run", "--topkk", "5"],
            "relfv run: error: unrecognized arguments: --topkk 5; did you mean --topk? (see relfv run --help)",
        ),
        (["run", "--n-eval=5"], "; did you mean --n_eval? (see relfv run --help)"),
        (["run", "--out", "x"], "; did you mean --out_root? (see relfv run --help)"),
        (["run", "--precision", "exat"], "; did you mean exact? (see relfv run --help)"),
        (["status", "--topk", "5"], "relfv status: error: unrecognized arguments: --topk (see relfv status --help)"),
        (["status", "a", "--out_root", "b"], "not allowed with argument"),
        (["completion", "tcsh"], "invalid choice: 'tcsh'"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_code_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    said = capsys.readouterr().err
    assert caught.value.code == 2
    assert words in said
    assert said.count("\n") == 1


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "relfv", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"relfv {__version__}"


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "scripts").glob("*.py")))
def test_every_script_explains_itself(script: str) -> None:
    done = subprocess.run(
        [sys.executable, f"scripts/{script}", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "--debug" in done.stdout


def test_debug_shows_where_an_error_came_from_and_nothing_else_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--relation_csv_path", "nowhere.csv"]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert main(["run", "--relation_csv_path", "nowhere.csv", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["", *EXAMPLES])
def test_every_example_of_the_help_parses_and_is_in_the_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([part for part in (command, "--help") if part not in ("", "relfv")])
    said = capsys.readouterr().out
    for line in EXAMPLES[command or "relfv"]:
        assert f"  {line}\n" in said
        args = build_parser().parse_args(shlex.split(line.split(" > ")[0])[1:])
        assert callable(args.run_command)


def test_every_command_but_those_of_single_layers_has_an_example() -> None:
    (commands,) = (action.choices for action in build_parser()._actions if action.dest == "command")
    assert set(commands or ()) - EXAMPLES.keys() <= {"stepe", "zeroshot", "step6"}


def test_status_and_verify_take_the_folder_as_run_takes_it(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("status", "verify"):
        said = []
        for place in ([str(finished.parent)], ["--out_root", str(finished.parent)]):
            assert main([command, *place]) == 0
            said.append(capsys.readouterr().out)
        assert said[0] == said[1] != ""


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_every_command_and_flag(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in ("demo-model", "doctor", "reuse_stepd", "mean_abs_delta_logit", "step6"):
        assert word in script
    if binary := shutil.which(shell):
        subprocess.run([binary, "-n", "/dev/stdin"], input=script, text=True, check=True)


@pytest.mark.slow
def test_a_reader_that_has_had_enough_is_no_error(finished: Path) -> None:
    """``relfv verify ... | head -1``"""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "relfv", "verify", str(finished)]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


HEAVY = ("torch", "transformers", "scipy.stats", "matplotlib")
LIGHT = {
    ("--help",): 0,
    ("run", "--help"): 0,
    ("--version",): 0,
    ("status", "$FINISHED"): 0,
    ("status", "--out_root", "$FINISHED"): 0,
    ("completion", "bash"): 0,
    ("run", "--config", "nowhere.json"): 2,
    ("doctor", "--relation_csv_path", "nowhere.csv", "--out_root", "$OUT"): 1,
    ("verify", "$FINISHED"): 0,
    ("report", "$COPY"): 0,
    ("run", "--model", "/nowhere", "--out_root", "$OUT"): 2,
    ("run", "--model", "demo", "--relation_csv_path", "$CSV", "--out_root", "$OUT"): 2,
    ("run", "--relation_csv_path", "nowhere.csv", "--out_root", "$OUT"): 2,
    ("run", "--n_eval", "0", "--out_root", "$OUT"): 2,
    ("heatmap", "--in_dir", "$OUT"): 2,
}
IN_FORKS = f"""
import json, os, sys
from relfv.cli import main
for words in json.loads(sys.argv[1]):
    if os.fork() == 0:
        try:
            code = main(words)
        except SystemExit as ending:
            code = ending.code or 0
        with open(sys.argv[2], "a") as file:
            print(code, [name for name in {HEAVY} if name in sys.modules], file=file)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def found(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], str]:
    """What each of ``LIGHT`` ended with and imported, in a fork of one process that had imported the command line."""
    folder = tmp_path_factory.mktemp("light")
    (folder / "wrong.csv").write_text("id,ex_A,ex_B\nQ1,dog\n")
    shutil.copytree(finished, folder / "copy")
    places = {"$FINISHED": finished, "$COPY": folder / "copy", "$OUT": folder / "out", "$CSV": folder / "wrong.csv"}
    given = json.dumps([[str(places.get(part, part)) for part in words] for words in LIGHT])
    subprocess.run([sys.executable, "-c", IN_FORKS, given, folder / "found"], cwd=ROOT, check=True)
    return dict(zip(LIGHT, (folder / "found").read_text().splitlines(), strict=True))


@pytest.mark.parametrize("words", LIGHT, ids=" ".join)
def test_what_needs_no_model_imports_nothing_that_takes_seconds(
    words: tuple[str, ...], found: dict[tuple[str, ...], str]
) -> None:
    assert found[words] == f"{LIGHT[words]} []"


def test_workers_are_of_ray_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--model", "demo", "--workers", "2"]) == 2
    said = capsys.readouterr().err
    assert "--workers 2: is of --ray; expected --ray too, or --devices or --per_card instead" in said
