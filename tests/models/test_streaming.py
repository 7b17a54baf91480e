"""Blocks that stream compute what resident ones do, to the last bit, and nobody reads a slot in passing."""

from __future__ import annotations

import gc
import itertools
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
from relfv.engine import hooks
from relfv.engine.answers import decode_vector, score_answers
from relfv.engine.arithmetic import Arithmetic
from relfv.engine.base import Backbone, Together
from relfv.engine.clean import run_clean
from relfv.engine.reference import ReferenceEngine
from relfv.engine.shared_prefix import SharedPrefixEngine
from relfv.language_model import LanguageModel, open_model
from relfv.models import placement, streaming
from relfv.models.architecture import resolve
from relfv.models.placement import Placement
from relfv.models.streaming import Streaming, brought
from relfv.progress import at_work
from relfv.types import HeadId, Prompts
from zoo import GPT2_LIKE, GROUPED, IDS, UNTIED, ZOO

DEEP: dict[str, Any] = {**GROUPED, **IDS, "num_hidden_layers": 5}
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**DEEP)),
    "llama, tied": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**DEEP, tie_word_embeddings=True)),
    "gemma3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**DEEP, **UNTIED, head_dim=20, sliding_window=6)),
    "gpt2, tied": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**{**GPT2_LIKE, "n_layer": 5})),
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**DEEP, num_local_experts=4)),
}
FITTING = [name for name, animal in ZOO.items() if animal.engine == "shared_prefix"]
IN_STEP = [
    *FITTING[::6],  # GPT-OSS, with sinks and experts, and OLMo 2 are among them
    "Mixtral: window, experts",
    "Qwen3-MoE: query and key norms, experts",
    "GPT-NeoX, Pythia: fused qkv, parallel residual",
    "OPT: norms after the blocks, embeddings of another width (350m)",
    "GPT-J: attends in its own code, partial rotary",
    "Falcon: ALiBi (rw)",
    "Bloom: attends in its own code, ALiBi",
    "Qwen2-VL: the text model inside a multimodal one, rotary of three axes",
]
"""Families whose passes run in step: some of all, and those that are unlike the others."""
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]


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
        slot.block = None
        if slot.read:
            slot.read = torch.cuda.current_stream().record_event()

    monkeypatch.setattr(streaming, "SLOTS", 2)
    monkeypatch.setattr(Streaming, "_leave", leave_poison)


def saved(build: Callable[[], Any], folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """In several files."""
    scale_up(build()).to(dtype).save_pretrained(folder, max_shard_size="60KB")
    make_tokenizer(vocab_size=300).save_pretrained(folder)
    assert len([*folder.glob("*.safetensors")]) > 1
    return folder


def opened(folder: Path, offload: str, device: str = "cpu", **options: Any) -> LanguageModel:
    return open_model(str(folder), device=device, offload=offload, **options)


def run(folder: Path, csv_path: Path, out: Path, device: str, *flags: str) -> dict[str, bytes]:
    arguments = ["--model", str(folder), "--relation_csv_path", str(csv_path), "--out_root", str(out)]
    few = ["--q_list", "A1", "--n_trials_per_q", "4", "--n_eval", "4", "--topk", "5"]
    assert main(["run", *arguments, *few, "--device", device, *flags]) == 0
    return contents(out / "pairs" / "A1" / "artifacts")


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", ["llama, tied", "gemma3", "gpt2, tied", "mixtral"])
def test_a_run_that_streams_writes_the_same_bytes(family: str, device: str, csv_path: Path, tmp_path: Path) -> None:
    folder = saved(FAMILIES[family], tmp_path / "model", torch.float32 if device == "cpu" else torch.bfloat16)
    resident = run(folder, csv_path, tmp_path / "none", device, "--offload", "none")
    for offload in ("cpu", "disk"):
        assert run(folder, csv_path, tmp_path / offload, device, "--offload", offload) == resident


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
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
    stored: torch.dtype, flags: list[str], device: str, csv_path: Path, tmp_path: Path
) -> None:
    folder = saved(FAMILIES["llama"], tmp_path / "model", stored)
    resident = run(folder, csv_path, tmp_path / "none", device, *flags, "--offload", "none")
    for offload in ("cpu", "disk"):
        assert run(folder, csv_path, tmp_path / offload, device, *flags, "--offload", offload) == resident


@pytest.mark.slow
def test_so_does_a_run_that_is_interrupted_resident_and_goes_on_streaming(csv_path: Path, tmp_path: Path) -> None:
    folder = saved(FAMILIES["llama"], tmp_path / "model")
    whole = run(folder, csv_path, tmp_path / "out", "cpu", "--offload", "none")
    (tmp_path / "out" / "pairs" / "A1" / "artifacts" / "fv_global_resid.pt").unlink()
    assert run(folder, csv_path, tmp_path / "out", "cpu", "--offload", "disk") == whole


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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("engine", [SharedPrefixEngine, ReferenceEngine])
@pytest.mark.parametrize("family", ["llama, tied", "gemma3", "mixtral"])
def test_every_reader_of_weights_reads_the_true_ones(family: str, engine: Any, device: str, tmp_path: Path) -> None:
    folder = saved(FAMILIES[family], tmp_path / "model", torch.bfloat16)
    resident = opened(folder, "none", device)
    expected = everything(resident, engine(resident.backbone))
    for offload in ("cpu", "disk"):
        model = opened(folder, offload, device)
        assert model.backbone.streaming
        found = everything(model, engine(model.backbone))
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        assert (model.check, model.facts()) == (resident.check, resident.facts())


@needs_gpu
def test_kernels_and_pieces_run_on_streamed_blocks(tmp_path: Path) -> None:
    folder = saved(FAMILIES["llama"], tmp_path / "model", torch.bfloat16)
    resident, streamed = (opened(folder, offload, "cuda").backbone.arithmetic for offload in ("none", "cpu"))
    assert resident.fusions
    assert streamed.fusions
    for part in ("norms", "mlps"):
        assert len(getattr(streamed.fusions, part)) == len(getattr(resident.fusions, part)) >= 5
    assert len(streamed.linears) == len(resident.linears) > 5 * 7


@needs_gpu
@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_the_card_never_holds_all_blocks(offload: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "vocab_size": 300}
    config = tf.LlamaConfig(**{**DEEP, **sizes, "num_attention_heads": 8}, dtype="bfloat16")
    torch.manual_seed(0)
    tf.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    make_tokenizer(vocab_size=300).save_pretrained(tmp_path)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = opened(tmp_path, offload, "cuda")
    with model.backbone.running():
        model.backbone.decoder(input_ids=torch.tensor([[1, 2, 3]], device="cuda"))
    weights = sum(p.nbytes for p in model.backbone.model.parameters())
    assert torch.cuda.max_memory_allocated() - before < weights / 2
    locked = {p.is_pinned() for block in model.arch.blocks for p in block.parameters()}
    assert locked == {offload == "cpu"}


@needs_gpu
def test_a_model_that_is_done_with_gives_its_memory_back(tmp_path: Path) -> None:
    folder = saved(FAMILIES["llama"], tmp_path / "model", torch.bfloat16)
    left = []
    for offload in ("cpu", "disk", "cpu"):
        model = opened(folder, offload, "cuda")
        with model.backbone.running():
            model.backbone.decoder(input_ids=torch.tensor([[1, 2, 3]], device="cuda"))
        del model
        gc.collect()
        left.append(torch.cuda.memory_allocated())
    assert left[0] == left[1] == left[2]  # workspaces of the first


@needs_gpu
def test_on_a_small_card_layers_are_in_all_three_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(FAMILIES["llama"], tmp_path / "model", torch.bfloat16)
    resident = opened(folder, "none", "cuda")
    blocks = sum(p.nbytes for block in resident.arch.blocks for p in block.parameters())
    monkeypatch.setattr(placement, "bytes_of_prompt", lambda *_: 1)
    monkeypatch.setattr(placement, "bytes_waiting", lambda *_: 0)
    monkeypatch.setattr(placement, "_SLACK", 0)
    rest = resident.backbone.weights_on_device - blocks
    monkeypatch.setattr(placement, "card_bytes", lambda *_: rest + int(blocks * 4.3 / 5))
    monkeypatch.setattr(placement, "available_bytes", lambda **_: int(blocks * 1.5 / 5 / 0.9))
    model = opened(folder, "auto", "cuda")
    found = model.backbone.streaming.placement  # type: ignore[union-attr]
    assert [len(where) for where in (found.resident, found.host, found.disk)] == [1, 1, 3]
    engines = [SharedPrefixEngine(one.backbone) for one in (resident, model)]
    expected, streamed = (everything(*pair) for pair in zip((resident, model), engines, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(expected, streamed, strict=True))


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
        assert begun[2] - begun[1] == begun[1] - begun[0] == pytest.approx(stream.placement.host_bytes, rel=0.01)
        x = torch.zeros(1, 1, model.arch.resid_dim)
        angles = model.backbone.decoder.rotary_emb(x, torch.tensor([[0]]))  # type: ignore[operator]
        for layer in (3, 0, 4, 1):  # an order that no pass has
            out = blocks[layer](x, position_embeddings=angles)
            assert torch.isfinite(out[0] if isinstance(out, tuple) else out).all()


@needs_gpu
def test_a_module_is_brought_to_a_device_and_taken_back() -> None:
    linear = torch.nn.Linear(3, 2)
    before = linear.weight.data
    with brought(linear, torch.device("cuda", 0)):
        assert linear(torch.zeros(1, 3, device="cuda")).is_cuda
    assert linear.weight.data_ptr() == before.data_ptr()


def engine_of(model: Any, streams: bool, device: str = "cpu") -> SharedPrefixEngine:
    """Where it streams, all blocks do."""
    model.to("cpu" if streams else device)
    arch, place = resolve(model, "auto"), torch.device(device, 0) if device == "cuda" else torch.device(device)
    where = Placement((), tuple(range(arch.n_layers)), (), 0, 0, 0)
    stream = streaming.stream(model, arch, where, place) if streams else None
    return SharedPrefixEngine(Backbone(model, arch, place, Arithmetic.with_kernels(model, arch, "exact"), stream))


def in_small_passes(engine: SharedPrefixEngine) -> list[torch.Tensor]:
    """What each kind of call gives, some prompts a pass."""
    backbone, arch = engine.backbone, engine.backbone.arch
    ids, _ = prompts_of_different_length()
    prompts, few = Prompts(ids, [5, 17, 123]), torch.Generator().manual_seed(0)
    values = torch.randn(arch.n_layers, arch.n_heads, arch.head_dim, generator=few)
    vectors = torch.randn(2, arch.resid_dim, generator=few)
    versions = [Together.setting([[HeadId(0, 1), HeadId(1, 0)]], values[None])]
    found = []
    for effects in (
        engine.sweep_heads(prompts, values, all_heads(backbone), per_pass=1),
        engine.inject(prompts, vectors, range(arch.n_layers), per_pass=2),
        engine.finer().sweep_heads(prompts[:2], None, all_heads(backbone), per_pass=1),
        engine.edit_together(prompts, versions, per_pass=2),
    ):
        found += [effects.base.logprob, effects.edited.logprob]
        found += [] if effects.lengths is None else [effects.lengths]
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", IN_STEP)
def test_passes_in_step_have_the_bits_of_passes_one_by_one(
    name: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = scale_up(ZOO[name].build()).to(torch.float32 if device == "cpu" else torch.bfloat16)
    expected = in_small_passes(engine_of(model, streams=False, device=device))
    monkeypatch.setattr(SharedPrefixEngine, "_pass", None)  # one by one is no way out
    found = in_small_passes(engine_of(model, streams=True, device=device))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def sweep(engine: SharedPrefixEngine) -> Any:
    """Two prompts a pass."""
    backbone = engine.backbone
    values = torch.ones(backbone.arch.n_layers, backbone.arch.n_heads, backbone.arch.head_dim)
    prompts = Prompts([[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8], [9, 7, 9]], [5, 17, 123, 2])
    return engine.sweep_heads(prompts, values, all_heads(backbone), per_pass=2)


def test_a_sweep_makes_one_trip_of_the_weights() -> None:
    engine = engine_of(scale_up(FAMILIES["llama"]()), streams=True)
    stream, trips = engine.backbone.streaming, []
    assert stream
    trip = sum(block.n_bytes for block in stream._blocks)
    for kept in (False, False, True):  # prefixes that are there or not
        if not kept:
            engine.kept.forget()
        before = stream.bytes_streamed
        with at_work("sweep", "", unit="prompts") as task:
            sweep(engine)
        trips.append((stream.bytes_streamed - before) / trip)
        assert (task.done, task.total) == (4, 4)
    assert trips[1:] == [1, 1]


def test_a_decoder_that_does_more_than_run_its_blocks_runs_one_pass_after_another() -> None:
    class Doubled(torch.nn.Module):
        def forward(self, hidden: torch.Tensor, **_: Any) -> torch.Tensor:
            return 2 * hidden

    found = []
    for streams in (False, True):
        model: Any = scale_up(FAMILIES["llama"]())
        engine = engine_of(model, streams)
        model.model.layers.insert(2, Doubled())
        model.config.num_hidden_layers += 1
        found.append(sweep(engine).edited.logprob)
    assert torch.equal(*found)


@pytest.mark.parametrize("problem", [torch.OutOfMemoryError, ValueError, KeyboardInterrupt])
def test_a_pass_that_fails_among_others_leaves_nothing_behind(problem: type[BaseException]) -> None:
    engine = engine_of(scale_up(FAMILIES["llama"]()), streams=True)
    model = engine.backbone.model
    expected = sweep(engine).edited.logprob
    engine.kept.forget()
    before = left_by(model)
    calls = itertools.count()

    def fail(*_: Any) -> None:
        if next(calls) == 2:  # the first is the prefixes' pass
            raise problem

    handle = engine.backbone.arch.blocks[3].mlp.register_forward_pre_hook(fail)  # type: ignore[union-attr]
    if problem is torch.OutOfMemoryError:
        assert sweep(engine).per_pass == 2
    else:
        with pytest.raises(problem):
            sweep(engine)
    handle.remove()
    assert left_by(model) == before
    assert torch.equal(sweep(engine).edited.logprob, expected)


def test_passes_too_many_to_wait_in_memory_run_one_after_another() -> None:
    engine = engine_of(scale_up(FAMILIES["llama"]()), streams=True)
    expected = sweep(engine).edited.logprob

    def fail(*_: Any) -> None:
        if hooks._turn is not None:
            raise torch.OutOfMemoryError

    engine.backbone.arch.blocks[3].mlp.register_forward_pre_hook(fail)  # type: ignore[union-attr]
    effects = sweep(engine)
    assert effects.per_pass == 2
    assert torch.equal(effects.edited.logprob, expected)


def left_by(model: Any) -> list[Any]:
    """Of each module its hooks and attributes, and where its weights are; and whose turn it is."""
    found: list[Any] = [hooks._turn, model.config._attn_implementation]
    for module in model.modules():
        found += [sorted(vars(module)), [*module._forward_pre_hooks], [*module._forward_hooks]]
        found += [parameter.data_ptr() for parameter in module.parameters(recurse=False)]
    return found


def test_weights_that_blocks_share_do_not_stream() -> None:
    model: Any = scale_up(FAMILIES["llama"]())
    arch, layers = resolve(model, "auto"), model.model.layers
    layers[1].mlp.up_proj.weight = layers[3].mlp.up_proj.weight
    layers[2].mlp.down_proj.bias = model.model.norm.weight
    own = placement.streamable(model, arch)
    assert ["mlp.up_proj.weight" in names for names in own] == [True, False, True, False, True]
    assert "mlp.down_proj.bias" not in own[2]
    ids = torch.tensor([[1, 2, 3]])
    with torch.inference_mode():
        expected = model(ids).logits
        stream = streaming.stream(model, arch, Placement((0,), (1, 2, 3, 4), (), 0, 0, 0), torch.device("cpu"))
        assert torch.equal(model(ids).logits, expected)
    assert stream.bytes_streamed


def test_the_log_says_what_streams(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        opened(saved(FAMILIES["llama"], tmp_path / "model"), "disk")
    assert "0 of 5 layers on the device" in caplog.text
    assert "5 stream from their files" in caplog.text
