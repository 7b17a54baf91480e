from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import relfv
from conftest import llama, make_tokenizer
from folders import contents
from relfv.errors import InputError

FAST = {"n_trials_per_q": 4, "topk": 3, "extras": "none"}


def state(model: Any) -> list[Any]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return [
        {n: (t.data_ptr(), t.dtype, t.requires_grad, str(t.device), t.is_inference()) for n, t in tensors.items()},
        {n: t.detach().clone() for n, t in tensors.items()},
        {n: (m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()},
        {n: sorted(vars(m)) for n, m in model.named_modules()},
        model.config.to_dict(),
        model.config._attn_implementation,
        model.generation_config.to_dict(),
        torch.get_float32_matmul_precision(),
        torch.get_num_threads(),
    ]  # fmt: skip


def assert_untouched(before: list[Any], after: list[Any]) -> None:
    for i, (one, other) in enumerate(zip(before, after, strict=True)):
        if i == 1:
            assert all(one[name].equal(other[name]) for name in one)
        else:
            assert one == other


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_of_the_users_own_comes_back_untouched_and_can_be_trained(
    csv_path: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    model = llama().to(dtype).train()
    before = state(model)
    run = relfv.run(csv_path, model, make_tokenizer(), out_root=tmp_path, q_list=["A1"], **FAST)
    assert_untouched(before, state(model))
    assert run.folder == tmp_path / "pairs"
    assert run["A1"].status == "completed"
    model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None


def test_a_soft_cap_is_kept_and_the_attention_that_was_chosen_comes_back(csv_path: Path) -> None:
    from zoo import ZOO

    model = next(animal for animal in ZOO.values() if animal.family == "Gemma 2").build()
    model.config._attn_implementation = "sdpa"  # as some releases of transformers choose it
    relfv.run(csv_path, model, make_tokenizer(vocab_size=300), out_root=None, q_list=["A1"], **{**FAST, "topk": 1})
    assert model.config._attn_implementation == "sdpa"


def test_an_open_model_gives_the_bytes_that_its_folder_gives(csv_path: Path, llama_path: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    named = relfv.run(csv_path, str(llama_path), out_root=tmp_path / "named", q_list=["A1"], **FAST)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(llama_path), AutoTokenizer.from_pretrained(llama_path)
    given = relfv.run(csv_path, model, tokenizer, out_root=tmp_path / "given", q_list=["A1"], **FAST)
    one, other = contents(named["A1"].artifacts), contents(given["A1"].artifacts)
    differing = {name for name in one if one[name] != other[name]}
    assert one.keys() == other.keys()
    assert differing == {"function_vector.safetensors"}  # which says by what the model is known
    again = relfv.run(csv_path, model, tokenizer, out_root=tmp_path / "given", q_list=["A1"], **FAST)
    assert contents(again["A1"].artifacts) == other
    model.model.layers[1].mlp.up_proj.weight.data *= 2
    with pytest.raises(relfv.InputError, match="the model's files or revision have changed"):
        relfv.run(csv_path, model, tokenizer, out_root=tmp_path / "given", q_list=["A1"], **FAST)


def test_in_memory_alone_nothing_is_left_on_disk(csv_path: Path) -> None:
    run = relfv.run(csv_path, llama(), make_tokenizer(), out_root=None, q_list=["A1"], **FAST)
    folder, fv = run.folder, run["A1"].function_vector
    assert folder.is_dir()
    del run
    assert not folder.exists()
    assert len(fv.vector) == 48


def test_a_frame_is_run_as_its_csv_is(csv_path: Path, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_csv(csv_path)
    model, tokenizer = llama(), make_tokenizer()
    run = relfv.run(frame, model, tokenizer, out_root=tmp_path, name="mine", q_list=["B2"], **FAST)
    assert run.folder == tmp_path / "mine"
    same = relfv.run(csv_path, model, tokenizer, out_root=tmp_path, q_list=["B2"], **FAST)
    assert (run["B2"].function_vector.vector == same["B2"].function_vector.vector).all()
    more = pandas.concat([frame, pandas.DataFrame({"id": ["D4"], "ex_A": ["a"], "ex_B": ["b"]})])
    run = relfv.run(more, model, tokenizer, out_root=tmp_path, name="mine", q_list=["B2", "D4"], **FAST)
    assert [run[q_id].status for q_id in run] == ["completed", "skipped"]
    assert len(list(tmp_path.glob("mine.csv*"))) == 2  # the former is kept


def test_what_cannot_be_run_is_refused_in_one_line(csv_path: Path, tmp_path: Path) -> None:
    model, tokenizer = llama(), make_tokenizer()
    packed = llama()
    packed.lm_head = type("Packed", (torch.nn.Module,), {})()
    pipeline = SimpleNamespace(model=model, tokenizer=tokenizer)
    refused = {
        "tokenizer is None": (csv_path, model, None, {}),
        "tokenizer is a str; expected the model's own": (csv_path, model, "llama", {}),
        "tokenizer is a Tokenizer; expected": (csv_path, model, tokenizer.backend_tokenizer, {}),
        "tokenizer is a SimpleNamespace; expected .*of a processor its .tokenizer": (csv_path, model, pipeline, {}),
        "knows no text, only 1 special token": (csv_path, model, _of_special_tokens_alone(), {}),
        "model is None; expected": (csv_path, None, tokenizer, {}),
        "model is a class; expected": (csv_path, type(model), tokenizer, {}),
        "model is a SimpleNamespace; expected .*of a pipeline its .model": (csv_path, pipeline, None, {}),
        "model is a DataParallel; expected .* its .module": (csv_path, torch.nn.DataParallel(model), tokenizer, {}),
        "a model given by its name brings its own": (csv_path, "demo", tokenizer, {}),
        "device='cuda': the model given is on cpu": (csv_path, model, tokenizer, {"device": "cuda"}),
        "output embeddings .Packed. hold no parameters": (csv_path, packed, tokenizer, {}),
        "its weights are float64; expected float32": (csv_path, llama().double(), tokenizer, {}),
        "top_k=...: is no setting here": (csv_path, model, tokenizer, {"top_k": 3}),
        "dtype='bfloat16': the model given has float32": (csv_path, model, tokenizer, {"dtype": "bfloat16"}),
        "relations is a list": ([("a", "b")], model, tokenizer, {}),
        "--topk 0: expected a whole number": (csv_path, model, tokenizer, {"topk": 0}),
        "no such file": (tmp_path / "none.csv", model, tokenizer, {}),
        "does not fit this checkpoint": (csv_path, model, tokenizer, {"model_spec": "gpt2"}),
    }
    for said, (relations, of, its, settings) in refused.items():
        with pytest.raises(relfv.InputError, match=said):
            relfv.run(relations, of, its, out_root=tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def _of_special_tokens_alone() -> Any:
    """What transformers 5 makes for some families where a model's folder holds no tokenizer."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    empty = Tokenizer(models.BPE(vocab={}, merges=[]))
    return PreTrainedTokenizerFast(tokenizer_object=empty, eos_token="<|endoftext|>")


def test_a_frame_that_is_refused_leaves_everything_as_it_was(csv_path: Path, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    good = pandas.read_csv(csv_path)
    bad, changed = good.copy(), good.copy()
    row = good.index[good["id"] == "A1"][0]
    bad.loc[row, "ex_B"], changed.loc[row, "ex_B"] = None, "another"
    model, tokenizer, out = llama(), make_tokenizer(), tmp_path / "there" / "yet to be made"

    def run(frame: Any, name: str = "mine") -> Any:
        return relfv.run(frame, model, tokenizer, out_root=out, name=name, q_list=["A1"], **FAST)

    with pytest.raises(InputError, match=r"^relations \(as a CSV\): 1 problem"):
        run(bad)
    for name in ("a/b", "..", ".hidden"):
        with pytest.raises(InputError, match="expected the name of a file"):
            run(good, name)
    assert not (tmp_path / "there").exists()
    run(good)
    before = contents(out)
    with pytest.raises(InputError, match="1 problem"):
        run(bad)
    with pytest.raises(InputError, match="the rows of A1 in the CSV have changed"):
        run(changed)
    assert contents(out) == before


def test_what_the_caller_has_set_for_all_of_pytorch_changes_nothing(csv_path: Path) -> None:
    model, tokenizer = llama(), make_tokenizer()

    def effects(of: Any = model) -> Any:
        opened = relfv.open_model(of, tokenizer)
        means = relfv.mean_activations(opened, ["Q: cat\nA: kitten\n\nQ: dog\nA:"])
        return opened.engine.name, relfv.head_effects(opened, ["Q: dog\nA:"], ["puppy"], means).delta().tolist()

    plain = effects()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert effects() == plain
    with torch.device("meta"):
        assert effects() == plain
    try:
        torch.set_default_dtype(torch.bfloat16)
        assert effects() == plain
        assert relfv.run(csv_path, "demo", out_root=None, q_list=["A1"], **FAST)["A1"].status == "completed"
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_compiled_model_is_used_uncompiled_and_is_compiled_again_afterwards() -> None:
    def never(graph: Any, inputs: Any) -> Any:
        raise AssertionError("compiled under hooks")

    tokenizer, inplace = make_tokenizer(), llama()
    inplace.compile(backend=never)
    for model in (inplace, torch.compile(llama(), backend=never)):
        before = inplace._compiled_call_impl
        opened = relfv.open_model(model, tokenizer)
        relfv.inject(opened, ["Q: dog\nA:"], ["puppy"], torch.ones(48))
        assert inplace._compiled_call_impl is before is not None


def test_what_is_wrong_in_a_frame_is_not_said_of_a_temporary_file() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"id": ["../x"], "ex_A": ["a"], "ex_B": ["b"]})
    with pytest.raises(relfv.InputError, match=r"^relations \(as a CSV\): 1 problem.*line 2"):
        relfv.run(frame, llama(), make_tokenizer(), out_root=None, **FAST)


def test_a_model_that_is_open_here_is_not_shared_out_to_other_devices(csv_path: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a model given as an object is on a device already"):
        relfv.run(csv_path, llama(), make_tokenizer(), out_root=tmp_path, devices="cpu,cpu", **FAST)
    with pytest.raises(InputError, match=r"per_card=\.\.\.: a model given as an object is on a device already"):
        relfv.run(csv_path, llama(), make_tokenizer(), out_root=tmp_path, per_card=2, **FAST)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("set_up", "told"), [("", True), ("logging.basicConfig(filename='own.log', level='INFO')", False)]
)
def test_a_program_that_set_up_no_logging_is_told_what_goes_on(tmp_path: Path, set_up: str, told: bool) -> None:
    program = f"import logging, relfv; {set_up}\nrelfv.open_model('demo')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert ("opened demo: LlamaForCausalLM" in done.stderr) == told
    assert done.stdout == ""
    assert told or "opened demo: LlamaForCausalLM" in (tmp_path / "own.log").read_text()
