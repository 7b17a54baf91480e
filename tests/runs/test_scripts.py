"""The spec's own command lines, word for word, in a real shell, and that they give what ``relfv run`` gives."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from conftest import ROOT
from crashes import Fork
from folders import arguments, contents, status
from relfv.cli import main

VARIABLES = """
MODEL={model}
MODEL_SPEC=llama3
SEED=0
REL=pairs
RELATION_CSV={csv}
N_TRIALS_PER_Q=25
N_DEMOS=9
SCORE_KEY=mean_delta_p
TOPK=20
ALPHA=1.0
N_EVAL=50
Q={q_id}
RUN_BASE={base}
"""

# TECH_SPEC_RELATION_QWISE, sections 5, 6, 7 and 9
STEP_D = r"""
python scripts/run_stepD_aie_head_sweep.py \
  --model ${MODEL} \
  --model_spec ${MODEL_SPEC} \
  --device ${DEVICE} \
  --dtype ${DTYPE} \
  --quant ${QUANT} \
  --layers all \
  --heads all \
  --relation_csv_path ${RELATION_CSV} \
  --relation_q_list ${Q} \
  --relation_n_trials_per_q ${N_TRIALS_PER_Q} \
  --relation_n_demos ${N_DEMOS} \
  --seed ${SEED} \
  --score_key ${SCORE_KEY} \
  --out_base_dir ${RUN_BASE}
"""
HEATMAP = r"""
python scripts/plot_stepD_aie_heatmap.py \
  --in_dir ${RUN_BASE}/artifacts \
  --metric ${SCORE_KEY} \
  --topk ${TOPK} \
  --out_name aie_heatmap_${Q}.png
"""
STEP_E = r"""
python scripts/run_stepE_topk_fv_and_eval.py \
  --stepd_artifacts_dir ${RUN_BASE}/artifacts \
  --sampled_trials_path ${RUN_BASE}/artifacts/sampled_trials.json \
  --k ${TOPK} \
  --score_key ${SCORE_KEY} \
  --model ${MODEL} \
  --model_spec ${MODEL_SPEC} \
  --device ${DEVICE} \
  --dtype ${DTYPE} \
  --quant ${QUANT} \
  --alpha ${ALPHA} \
  --out_dir ${RUN_BASE}/artifacts
"""
STEP_6 = r"""
for LAYER in 0 1 2; do
python scripts/run_step6_fv_injection_eval.py \
  --model ${MODEL} \
  --model_spec ${MODEL_SPEC} \
  --fv_global_path ${RUN_BASE}/artifacts/fv_global_resid.pt \
  --sampled_trials_path ${RUN_BASE}/artifacts/sampled_trials_zeroshot.json \
  --edit_layer ${LAYER} \
  --alpha ${ALPHA} \
  --n_eval ${N_EVAL} \
  --out_dir ${RUN_BASE}/artifacts/step6/layer_${LAYER}
done
"""


def shell(script: str, model: Path, csv: Path, base: Path, q_id: str = "B2", environment: dict[str, str] | None = None):  # type: ignore[no-untyped-def]
    """Run with ``python`` being this interpreter."""
    return bash(
        re.sub(r"^python ", f"{sys.executable} ", script, flags=re.MULTILINE), model, csv, base, q_id, environment
    )


def bash(script: str, model: Path, csv: Path, base: Path, q_id: str, environment: dict[str, str] | None = None):  # type: ignore[no-untyped-def]
    """``script`` in a shell that knows the spec's variables."""
    variables = VARIABLES.format(model=model, csv=csv, base=base, q_id=q_id)
    return subprocess.run(
        ["bash", "-c", f"set -e\n{variables}{script}"], cwd=ROOT, env={**os.environ, **(environment or {})},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def in_forks(script: str, model: Path, csv: Path, base: Path, environment: dict[str, str] | None = None) -> None:
    """The same without six seconds of imports a command: a shell expands each, a fork of this process runs its file."""
    told = bash("python() { printf '%s\\0' \"$@\"; printf '\\0'; }\n" + script, model, csv, base, "B2", environment)
    assert told.returncode == 0, told.stderr
    base.mkdir(parents=True, exist_ok=True)
    for command in told.stdout.removesuffix("\0\0").split("\0\0"):
        fork = Fork(partial(run_file, command.split("\0"), environment or {}), base.parent / f"{base.name}.said")
        assert fork.wait() == 0, fork.said()


def run_file(argv: list[str], environment: dict[str, str]) -> int:
    """What ``python argv`` does, with these variables -> its exit code."""
    os.environ.update(environment)
    sys.argv = argv
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / argv[0]), run_name="__main__")
    return int(ended.value.code or 0)


@pytest.mark.slow
def test_the_specs_commands_give_the_bytes_of_the_pipeline_and_complete_the_q_id(
    finished: Path, llama_path: Path, csv_path: Path, tmp_path: Path
) -> None:
    base = tmp_path / "pairs" / "B2"
    in_forks(STEP_D + HEATMAP + STEP_E + STEP_6, llama_path, csv_path, base)
    assert contents(base / "artifacts") == contents(finished / "B2/artifacts")
    assert status(tmp_path / "pairs", "B2")["status"] == "completed"
    # and the orchestrator has nothing left to do
    arguments = ["run", "--model", str(llama_path), "--relation_csv_path", str(csv_path), "--out_root", str(tmp_path)]
    assert main([*arguments, "--q_list", "B2"]) == 0
    assert json.loads((tmp_path / "pairs/run_manifest.json").read_text())["outcomes"] == {}


@pytest.mark.slow
def test_the_pipeline_goes_on_from_scripts_that_named_what_auto_means(
    finished: Path, llama_path: Path, csv_path: Path, tmp_path: Path
) -> None:
    base = tmp_path / "pairs" / "B2"
    in_forks(STEP_D, llama_path, csv_path, base, {"DTYPE": "fp32", "MODEL_SPEC": "llama3"})
    assert main([*arguments(llama_path, csv_path, tmp_path), "--q_list", "B2", "--dtype", "auto"]) == 0
    assert contents(base / "artifacts") == contents(finished / "B2/artifacts")


@pytest.mark.slow
def test_what_the_environment_says_is_taken_and_later_commands_that_do_not_say_go_on_in_it(
    llama_path: Path, csv_path: Path, tmp_path: Path
) -> None:
    """Section 9 gives Step6 no --dtype, so it must be what StepD was told."""
    base = tmp_path / "B2"
    environment = {"DEVICE": "cpu", "DTYPE": "bf16", "QUANT": "none"}
    # In a fork PyTorch has no threads to load weights in another dtype.
    done = shell(STEP_D, llama_path, csv_path, base, environment=environment)
    assert done.returncode == 0, done.stderr
    config = status(tmp_path, "B2")["config"]
    assert (config["device"], config["dtype"], config["quant"]) == ("cpu", "bfloat16", "none")
    done = shell("DTYPE=bf16\n" + STEP_E + STEP_6.replace("0 1 2", "1"), llama_path, csv_path, base)
    assert done.returncode == 0, done.stderr
    assert json.loads((base / "artifacts/step6/layer_1/eval_meta.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.slow
def test_a_skipped_q_id_stays_skipped_through_the_specs_whole_loop(
    llama_path: Path, csv_path: Path, tmp_path: Path
) -> None:
    done = shell(STEP_D + HEATMAP + STEP_E + STEP_6.replace("0 1 2", "0"), llama_path, csv_path, tmp_path / "C3", "C3")
    assert done.returncode == 0, done.stderr
    assert status(tmp_path, "C3")["status"] == "skipped"
    assert "9 rows" in status(tmp_path, "C3")["reason"]
