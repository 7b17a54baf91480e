"""A model in one GGUF file, written here by the package ``gguf``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers as tf

from conftest import make_tokenizer, scale_up
from relfv.cli import main
from relfv.language_model import open_model
from relfv.models.sources import model_identity

gguf = pytest.importorskip("gguf")

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def tiny() -> Any:
    config = tf.LlamaConfig(
        vocab_size=420, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=96, max_position_embeddings=512, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    return scale_up(tf.LlamaForCausalLM(config))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """The file, with matrices in 8 bits, and the weights it stands for by their names in transformers."""
    model, tokenizer = tiny(), make_tokenizer()
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in {
        "context_length": 512, "embedding_length": 64, "block_count": 3, "feed_forward_length": 96, "head_count": 4,
        "head_count_kv": 2, "layer_norm_rms_eps": model.config.rms_norm_eps, "rope_dimension_count": 16,
        "vocab_size": 420, "rope_freq_base": 10000.0,
    }.items():  # fmt: skip
        getattr(writer, f"add_{name}")(value)
    state = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(state["vocab"], key=state["vocab"].__getitem__)
    tokens += [f"<unused{i}>" for i in range(420 - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<") else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in state["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    stands_for = {}
    for name, tensor in model.state_dict().items():
        weight = tensor.numpy()
        if weight.ndim == 2:
            packed = gguf.quants.quantize(for_llama_cpp(name, weight), gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(in_gguf(name), packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            weight = gguf.quants.dequantize(
                gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q8_0), gguf.GGMLQuantizationType.Q8_0
            )
        else:
            writer.add_tensor(in_gguf(name), weight)
        stands_for[name] = weight
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, stands_for


def in_gguf(name: str) -> str:
    parts = name.split(".")
    if parts[1] == "layers":
        return f"blk.{parts[2]}.{NAMES['.'.join(parts[3:-1])]}.weight"
    return {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}[name[:-7]] + ".weight"


def for_llama_cpp(name: str, weight: np.ndarray) -> np.ndarray:
    """Queries and keys with the two halves of each rotary pair side by side."""
    n_heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2], 0)
    if not n_heads:
        return weight
    return weight.reshape(n_heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def test_a_gguf_file_opens_with_the_weights_it_stands_for(written: tuple[Path, dict[str, np.ndarray]]) -> None:
    path, stands_for = written
    model = open_model(str(path), device="cpu")
    assert (model.engine.name, model.arch.family, model.dtype) == ("shared_prefix", "llama3", "float32")
    assert model.check.max_error is not None
    assert model.check.max_error < 1e-3
    assert model.arch.notes[-1].startswith("weights are stored packed (gguf) and were unpacked to float32")
    found = model.backbone.model.state_dict()
    for name, true in stands_for.items():
        np.testing.assert_allclose(found[name].numpy(), true, rtol=1e-6)
    assert model.tokens.tokenizer("Q: dog\nA:")["input_ids"][-4:] == make_tokenizer()("Q: dog\nA:")["input_ids"][-4:]


def test_a_gguf_files_identity_is_its_content(written: tuple[Path, Any], tmp_path: Path) -> None:
    path, _ = written
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(path.read_bytes())
    assert model_identity(str(copy)) == model_identity(str(path))
    assert model_identity(str(path)).startswith("file-sha256:")
    copy.write_bytes(path.read_bytes()[:-1] + b"\1")
    assert model_identity(str(copy)) != model_identity(str(path))


def test_a_run_on_a_gguf_file_ends_completed_and_a_dry_run_says_what_it_takes(
    written: tuple[Path, Any], csv_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = written
    command = ["run", "--model", str(path), "--relation_csv_path", str(csv_path), "--out_root", str(tmp_path)]
    command += ["--q_list", "A1", "--n_trials_per_q", "3", "--n_demos", "3", "--n_eval", "3", "--topk", "4"]
    assert main([*command, "--dry_run"]) == 0
    assert "in float32; stored as gguf and unpacked on opening" in " ".join(capsys.readouterr().out.split())
    assert main(command) == 0
    artifacts = tmp_path / "pairs/A1/artifacts"
    assert json.loads((artifacts / "qid_status.json").read_text())["status"] == "completed"
    assert main([*command, "--quant", "4bit", "--force"]) == 2
    assert "packed already (gguf)" in capsys.readouterr().err
