"""A run of one relation on the demo model, and that model as a user opens it."""

from __future__ import annotations

from typing import Any

import pytest

import relfv
from conftest import ROOT

DEMO = ROOT / "src/relfv/demo/weights"


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> relfv.Run:
    csv = ROOT / "datasets/relation/relationA_ex.csv"
    out = tmp_path_factory.mktemp("demo_run")
    return relfv.run(csv, "demo", q_list=["Q15"], out_root=out, n_trials_per_q=12)


@pytest.fixture
def demo_model() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(DEMO).eval()


@pytest.fixture
def demo_tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DEMO)
