from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import relfv
from conftest import llama, make_tokenizer, scale_up
from parity import all_heads, assert_same_scores, prompts_of_different_length, replacements, rounding
from relfv.engine.arithmetic import Precision
from relfv.engine.shared_prefix import SharedPrefixEngine
from relfv.errors import InputError, RunError
from relfv.language_model import open_model
from relfv.types import Prompts
from zoo import ZOO, plain_backbone

PRECISIONS: tuple[Precision, ...] = ("exact", "fast")


def test_a_local_folder_opens_with_its_self_check(llama_path: Path) -> None:
    model = open_model(str(llama_path), "llama3", device="cpu")
    assert model.engine.name == "shared_prefix"
    assert model.dtype == "float32"
    assert model.arch.n_layers == 3


def test_the_demo_model_opens_by_name_through_the_same_path() -> None:
    model = open_model("demo", "llama3", device="cpu")
    assert model.engine.name == "shared_prefix"
    assert type(model.backbone.model).__name__ == "LlamaForCausalLM"


def test_the_dtype_asked_for_is_the_dtype_of_the_weights(llama_path: Path) -> None:
    assert open_model(str(llama_path), "auto", device="cpu", dtype="bf16").dtype == "bfloat16"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "someone/some-model-that-is-nowhere"}, "cannot open its config"),
        ({"quant": "4bit", "offload": "cpu"}, "packed weights do not stream"),
        ({"spec": "gpt2"}, "expected llama3 or llama: use --model_spec llama3, or auto"),
    ],
)
def test_what_cannot_be_opened_is_said_in_one_line(llama_path: Path, change: dict[str, str], words: str) -> None:
    asked = {"name": str(llama_path), "spec": "auto", "device": "cpu", **change}
    with pytest.raises(InputError) as caught:
        open_model(**asked)  # type: ignore[arg-type]
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_tokenizer_is_told_as_such_where_transformers_makes_an_empty_one(
    llama_path: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(llama_path, tmp_path / "model"))
    for path in folder.glob("*token*"):
        path.unlink()
    config = json.loads((folder / "config.json").read_text())
    kind = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    (folder / "config.json").write_text(json.dumps({**config, **kind}))
    with pytest.raises(InputError, match=r"cannot open its tokenizer|knows no text, only 1 special token"):
        open_model(str(folder), "auto", device="cpu")


def test_the_damaged_file_of_several_is_named(llama_path: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama_path, tmp_path / "model"))
    whole = tf.AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    whole.save_pretrained(folder, max_shard_size="40KB")
    second = sorted(folder.glob("*.safetensors"))[1]
    second.write_bytes(second.read_bytes()[:-8])
    with pytest.raises(InputError, match=f"cannot open its model: {second.name}: .* copy that file again"):
        open_model(str(folder), "auto", device="cpu")


def test_an_adapter_in_use_around_an_output_projection_is_to_be_merged_first() -> None:
    class Adapted(torch.nn.Module):  # as peft wraps a layer
        def __init__(self, layer: torch.nn.Linear) -> None:
            super().__init__()
            self.base_layer, self.weight = layer, layer.weight
            self.in_features, self.out_features = layer.in_features, layer.out_features
            self.bias, self.change = layer.bias, torch.nn.Linear(layer.in_features, layer.out_features, bias=False)

        def forward(self, z: torch.Tensor) -> torch.Tensor:
            return self.base_layer(z) + self.change(z)

    model: Any = llama().requires_grad_(False)
    attention = model.model.layers[1].self_attn
    attention.o_proj = Adapted(attention.o_proj).requires_grad_(False)
    with pytest.raises(RunError, match=r"layer 1: .* merge the adapter into the model first"):
        relfv.open_model(model, make_tokenizer())


@pytest.mark.slow
def test_a_model_in_the_hugging_face_cache_opens_by_its_id_without_a_network(llama_path: Path, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "models--someone--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/main").write_text(commit)
    shutil.copytree(llama_path, repo / "snapshots" / commit)
    program = (
        "from relfv.models.sources import model_identity\n"
        "from relfv.language_model import open_model\n"
        "print(model_identity('someone/tiny'), open_model('someone/tiny', 'llama3', device='cpu').arch.n_layers)"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == f"hub:someone/tiny@{commit} 3", done.stderr


@pytest.mark.slow
def test_a_revision_opens_at_its_commit_and_is_part_of_the_identity(llama_path: Path, tmp_path: Path) -> None:
    commits = {
        "main": "0123456789abcdef0123456789abcdef01234567",
        "step1000": "89abcdef0123456789abcdef0123456789abcdef",
    }
    repo = tmp_path / "models--someone--tiny"
    (repo / "refs").mkdir(parents=True)
    for name, commit in commits.items():
        (repo / "refs" / name).write_text(commit)
        shutil.copytree(llama_path, repo / "snapshots" / commit)
    config = repo / "snapshots" / commits["step1000"] / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "initializer_range": 0.077}))
    program = (
        "from relfv.models.sources import model_identity\n"
        "from relfv.language_model import open_model\n"
        "for revision in ('', 'step1000', '89abcdef0123456789abcdef0123456789abcdef'):\n"
        "    model = open_model('someone/tiny', revision=revision, device='cpu')\n"
        "    print(model_identity('someone/tiny', revision), model.backbone.model.config.initializer_range)\n"
        "open_model('someone/tiny', revision='step9', device='cpu')"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    main, other = f"hub:someone/tiny@{commits['main']}", f"hub:someone/tiny@{commits['step1000']}"
    lines = done.stdout.splitlines()
    assert lines[0].startswith(main), done.stderr
    assert lines[1] == lines[2] == f"{other} 0.077", done.stderr
    assert (
        "--model 'someone/tiny': no such folder or file is here, and relfv cannot open its config at revision 'step9'"
        in done.stderr
    )


def test_a_folder_has_no_revisions(llama_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder, and only models on the hub have revisions"):
        open_model(str(llama_path), revision="step1000", device="cpu")


@pytest.mark.parametrize(
    ("family", "spec"), [("Gemma 3 with vision", "gemma"), ("LLaVA", "llama3"), ("Qwen2-VL", "qwen2")]
)
def test_a_multimodal_checkpoint_opens_for_its_text_model(
    family: str, spec: str, save_model: Callable[..., Path]
) -> None:
    build = next(animal.build for animal in ZOO.values() if animal.family == family)
    folder = save_model(scale_up(build()), make_tokenizer(vocab_size=290))
    model = open_model(str(folder), spec, device="cpu")
    assert model.engine.name == "shared_prefix"
    assert (model.arch.family, model.arch.n_layers, model.arch.n_heads) == (spec, 3, 4)


def test_a_model_that_predicts_no_next_token_is_bad_input(save_model: Callable[..., Path]) -> None:
    config = tf.T5Config(vocab_size=300, d_model=48, num_layers=1, num_heads=4, d_ff=64, d_kv=12)
    with pytest.raises(InputError, match=r"its model_type is 't5', which transformers .* does not know as a causal"):
        open_model(str(save_model(tf.T5ForConditionalGeneration(config))), "auto", device="cpu")


def test_a_model_with_soft_capped_scores_attends_by_code_that_knows_the_cap(save_model: Callable[..., Path]) -> None:
    config = tf.Gemma2Config(
        vocab_size=420, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=12, attn_logit_softcapping=2.0,
    )  # fmt: skip
    folder = save_model(scale_up(tf.Gemma2ForCausalLM(config)))
    model = open_model(str(folder), device="cpu")
    assert model.backbone.model.config._attn_implementation == "eager"
    assert model.check.max_error is not None
    assert model.check.max_error <= rounding(model.backbone.model.config.final_logit_softcapping)


def test_on_a_cpu_bf16_weights_are_held_in_float32_in_exact_and_their_dtype_is_still_said(
    save_model: Callable[..., Path],
) -> None:
    path = str(save_model(llama().bfloat16()))
    exact, fast = (open_model(path, device="cpu", precision=how) for how in PRECISIONS)
    held = [{p.dtype for p in model.backbone.model.parameters()} for model in (exact, fast)]
    assert held == [{torch.float32}, {torch.bfloat16}]
    assert exact.dtype == fast.dtype == "bfloat16"
    # and the same numbers come out as where a pass widens them
    prompts = Prompts(*prompts_of_different_length())
    values = replacements(exact.backbone, prompts.ids)
    narrow = SharedPrefixEngine(plain_backbone(fast.backbone.model))
    effects = [engine.sweep_heads(prompts, values, all_heads(exact.backbone)) for engine in (exact.engine, narrow)]
    assert_same_scores(effects[0].edited, effects[1].edited)


def test_constants_rounded_to_the_weights_dtype_are_noted(save_model: Callable[..., Path]) -> None:
    gemma = next(animal for animal in ZOO.values() if animal.family == "Gemma 3")
    path = str(save_model(scale_up(gemma.build()), make_tokenizer(vocab_size=300)))
    notes = {dtype: open_model(path, device="cpu", dtype=dtype).arch.notes for dtype in ("bfloat16", "float32")}
    assert not any("rounds to" in note for note in notes["float32"])
    (note,) = [note for note in notes["bfloat16"] if "rounds to" in note]
    assert "this family scales its embeddings by 6.9282, which its weights' torch.bfloat16 rounds to 6.9375" in note


def test_opening_leaves_the_users_progress_bars_as_they_were(llama_path: Path) -> None:
    from transformers.utils import logging as hf_logging

    for enabled in (True, False):
        (hf_logging.enable_progress_bar if enabled else hf_logging.disable_progress_bar)()
        open_model(str(llama_path))
        assert hf_logging.is_progress_bar_enabled() is enabled
    hf_logging.enable_progress_bar()
