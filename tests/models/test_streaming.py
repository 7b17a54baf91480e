"""Blocks that stream compute what resident ones do, to the last bit, and nobody reads a slot in passing."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from conftest import make_tokenizer, scale_up
from folders import contents
from parity import all_heads, prompts_of_different_length
from relfv.cli import main
from relfv.engine.answers import decode_vector, score_answers
from relfv.engine.base import Together
from relfv.engine.clean import run_clean
from relfv.engine.reference import ReferenceEngine
from relfv.engine.shared_prefix import SharedPrefixEngine
from relfv.language_model import LanguageModel, open_model
from relfv.models import streaming
from relfv.models.streaming import Streaming, brought
from relfv.types import HeadId, Prompts
from zoo import EXPERTS, GPT2_LIKE, GROUPED, IDS, SMALL, UNTIED, ZOO

DEEP: dict[str, Any] = {**GROUPED, **IDS, "num_hidden_layers": 5}
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**DEEP)),
    "llama, tied": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**DEEP, tie_word_embeddings=True)),
    "gemma3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**DEEP, **UNTIED, head_dim=20, sliding_window=6)),
    "gpt2, tied": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**{**GPT2_LIKE, "n_layer": 5})),
    "gpt-neox": lambda: tf.GPTNeoXForCausalLM(
        tf.GPTNeoXConfig(**{**SMALL, "num_hidden_layers": 5}, **IDS, intermediate_size=64)
    ),
    "olmo2": lambda: tf.Olmo2ForCausalLM(tf.Olmo2Config(**DEEP)),
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**DEEP, num_local_experts=4)),
    "qwen3-moe": lambda: tf.Qwen3MoeForCausalLM(
        tf.Qwen3MoeConfig(**DEEP, **EXPERTS, head_dim=20, moe_intermediate_size=32)
    ),
}
REFERENCE_ONLY = next(name for name, animal in ZOO.items() if animal.engine == "reference")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two slots, and what a block leaves in its slot is NaN a moment later."""
    leave = Streaming._leave

    def leave_poison(self: Streaming, index: int) -> None:
        leave(self, index)
        slot = self._slot_of(index)
        assert slot
        assert len(self._blocks) > len(self.slots)
        slot.memory.fill_(255)

    monkeypatch.setattr(streaming, "SLOTS", 2)
    monkeypatch.setattr(Streaming, "_leave", leave_poison)


def saved(build: Callable[[], Any], folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """In several files."""
    scale_up(build()).to(dtype).save_pretrained(folder, max_shard_size="60KB")
    make_tokenizer(vocab_size=300).save_pretrained(folder)
    assert len([*folder.glob("*.safetensors")]) > 1
    return folder


def opened(folder: Path, offload: str, **options: Any) -> LanguageModel:
    return open_model(str(folder), device="cpu", offload=offload, **options)


def run(folder: Path, csv_path: Path, out: Path, *flags: str) -> dict[str, bytes]:
    arguments = ["--model", str(folder), "--relation_csv_path", str(csv_path), "--out_root", str(out)]
    assert main(["run", *arguments, "--q_list", "A1", "--device", "cpu", *flags]) == 0
    return contents(out / "pairs" / "A1" / "artifacts")


@pytest.mark.slow
@pytest.mark.parametrize("offload", ["cpu", "disk"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_that_streams_writes_the_same_bytes(
    family: str, offload: str, csv_path: Path, tmp_path: Path
) -> None:
    folder = saved(FAMILIES[family], tmp_path / "model")
    resident = run(folder, csv_path, tmp_path / "none", "--offload", "none")
    assert run(folder, csv_path, tmp_path / offload, "--offload", offload) == resident


@pytest.mark.slow
@pytest.mark.parametrize("offload", ["cpu", "disk"])
@pytest.mark.parametrize(
    ("stored", "flags"),
    [
        (torch.bfloat16, ["--precision", "exact"]),
        (torch.bfloat16, ["--precision", "fast"]),
        (torch.float16, ["--dtype", "fp32"]),
        (torch.float32, ["--dtype", "bf16"]),
    ],
)
def test_so_does_one_of_weights_in_another_dtype(
    stored: torch.dtype, flags: list[str], offload: str, csv_path: Path, tmp_path: Path
) -> None:
    folder = saved(FAMILIES["llama"], tmp_path / "model", stored)
    resident = run(folder, csv_path, tmp_path / "none", *flags)
    assert run(folder, csv_path, tmp_path / offload, *flags, "--offload", offload) == resident


@pytest.mark.slow
def test_so_does_a_run_that_is_interrupted_resident_and_goes_on_streaming(csv_path: Path, tmp_path: Path) -> None:
    folder = saved(FAMILIES["llama"], tmp_path / "model")
    whole = run(folder, csv_path, tmp_path / "out", "--offload", "none")
    (tmp_path / "out" / "pairs" / "A1" / "artifacts" / "fv_global_resid.pt").unlink()
    assert run(folder, csv_path, tmp_path / "out", "--offload", "disk") == whole


def everything(model: LanguageModel, engine: Any) -> list[torch.Tensor]:
    """What every reader of weights makes of the model."""
    backbone, arch = model.backbone, model.arch
    ids, _ = prompts_of_different_length()
    prompts = Prompts(ids, [5, 17, 123])
    clean = run_clean(backbone, prompts)
    means = clean.activations.mean(0)
    vector = arch.project_head(2, 1, means[2, 1]).float()
    found = [clean.activations, clean.hidden, vector]
    heads, set_together = all_heads(backbone), Together.setting([[HeadId(0, 1), HeadId(3, 0)]], means[None])
    for effects in (
        engine.sweep_heads(prompts, means, heads),
        engine.inject(prompts, vector[None], range(arch.n_layers)),
        engine.edit_together(prompts, [set_together]),
        engine.finer().sweep_heads(prompts, None, heads),
    ):
        found += [effects.base.logprob, effects.edited.logprob]
    answers = score_answers(backbone, ids, [[7, 9], [3], [4, 4, 4]], lengths=[5, 5, 5])
    found.append(torch.tensor([answer.logprob for answer in answers]))
    found += [torch.tensor([answer.written for answer in answers]), torch.tensor(decode_vector(backbone, [1], vector))]
    if clean.writing and clean.writing.gains is not None:
        found += [clean.writing.gains, clean.writing.factors]
    return found


@pytest.mark.parametrize("engine", [SharedPrefixEngine, ReferenceEngine])
@pytest.mark.parametrize("offload", ["cpu", "disk"])
@pytest.mark.parametrize("family", ["llama, tied", "gemma3", "mixtral"])
def test_every_reader_of_weights_reads_the_true_ones(family: str, offload: str, engine: Any, tmp_path: Path) -> None:
    folder = saved(FAMILIES[family], tmp_path / "model", torch.bfloat16)
    models = [opened(folder, "none"), opened(folder, offload)]
    resident, streamed = (everything(model, engine(model.backbone)) for model in models)
    assert models[1].backbone.streaming
    assert all(torch.equal(a, b) for a, b in zip(resident, streamed, strict=True))
    assert models[0].check == models[1].check
    assert models[0].facts() == models[1].facts()


def test_at_rest_a_streamed_blocks_weights_are_its_true_ones(tmp_path: Path) -> None:
    folder = saved(FAMILIES["llama"], tmp_path / "model")
    resident = dict(opened(folder, "none").backbone.model.named_parameters())
    for offload in ("cpu", "disk"):
        model = opened(folder, offload)
        slots = model.backbone.streaming.slots  # type: ignore[union-attr]
        memory = {slot.memory.untyped_storage().data_ptr() for slot in slots}
        for name, parameter in model.backbone.model.named_parameters():
            assert torch.equal(parameter, resident[name])
            assert parameter.untyped_storage().data_ptr() not in memory


def test_weights_from_files_stay_in_the_files(tmp_path: Path) -> None:
    """They are mapped: of the process's own memory, streaming takes slots and stages alone."""
    folder = saved(FAMILIES["llama"], tmp_path / "model")
    model = opened(folder, "disk")
    mapped = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
    spans = [tuple(int(end, 16) for end in line[0].split("-")) for line in mapped]
    for block in model.arch.blocks:
        for parameter in block.parameters():
            assert any(start <= parameter.data_ptr() < end for start, end in spans)


def test_a_block_that_fails_leaves_no_slot_behind(tmp_path: Path) -> None:
    model = opened(saved(FAMILIES["llama"], tmp_path / "model"), "cpu")
    before = [p.data_ptr() for p in model.arch.blocks[2].parameters()]
    ids = torch.tensor([[1, 2, 3]])
    with model.backbone.running():
        expected = model.backbone.decoder(input_ids=ids)[0]
        handle = model.arch.blocks[2].mlp.register_forward_pre_hook(lambda *_: 1 / 0)  # type: ignore[union-attr]
        with pytest.raises(ZeroDivisionError):
            model.backbone.decoder(input_ids=ids)
        handle.remove()
        assert torch.equal(model.backbone.decoder(input_ids=ids)[0], expected)
    assert [p.data_ptr() for p in model.arch.blocks[2].parameters()] == before


def test_each_block_is_copied_once_a_pass_whatever_came_before(tmp_path: Path) -> None:
    model = opened(saved(FAMILIES["llama"], tmp_path / "model"), "cpu")
    stream, blocks = model.backbone.streaming, model.arch.blocks
    assert stream
    with model.backbone.running():
        begun = []
        for _ in range(3):
            model.backbone.decoder(input_ids=torch.tensor([[1, 2, 3]]))
            begun.append(stream.bytes_streamed)
        of_pass = stream.placement.host_bytes
        assert begun[2] - begun[1] == begun[1] - begun[0] == of_pass
        x = torch.zeros(1, 1, model.arch.resid_dim)
        angles = model.backbone.decoder.rotary_emb(x, torch.tensor([[0]]))  # type: ignore[operator]
        for layer in (3, 0, 4, 1):  # an order that no pass has
            out = blocks[layer](x, position_embeddings=angles)
            assert torch.isfinite(out[0] if isinstance(out, tuple) else out).all()


def test_a_module_is_brought_to_a_device_and_taken_back(tmp_path: Path) -> None:
    linear = torch.nn.Linear(3, 2)
    before = linear.weight.data
    with brought(linear, torch.device("meta")):
        assert linear.weight.device.type == "meta"
    assert linear.weight.data_ptr() == before.data_ptr()


def test_weights_that_blocks_share_do_not_stream(tmp_path: Path) -> None:
    def shared() -> Any:
        model = FAMILIES["llama"]()
        return model

    model = opened(saved(shared, tmp_path / "model"), "none")
    blocks: Any = model.arch.blocks
    blocks[1].mlp.up_proj.weight = blocks[3].mlp.up_proj.weight
    own = streaming.streamable(model.backbone.model, model.arch)
    assert ["mlp.up_proj.weight" in names for names in own] == [True, False, True, False, True]


def test_the_log_says_what_streams(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        opened(saved(FAMILIES["llama"], tmp_path / "model"), "disk")
    assert "0 of 5 layers on the device" in caplog.text
    assert "5 stream from their files" in caplog.text
