from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf

from conftest import llama
from every_lm import tiny_model
from relfv.errors import InputError
from relfv.models.architecture import resolve
from zoo import ZOO


def zoo(family: str) -> Any:
    return next(animal for animal in ZOO.values() if animal.family == family).build()


@pytest.mark.parametrize(
    ("family", "asked", "right"),
    [
        ("Gemma 3", "llama3", "model_type 'gemma3_text'; expected gemma: use --model_spec gemma, or auto"),
        ("Qwen3", "llama3", "model_type 'qwen3'; expected qwen3: use --model_spec qwen3, or auto"),
        ("Qwen2", "mistral", "model_type 'qwen2'; expected qwen2: use --model_spec qwen2, or auto"),
        ("GPT-2", "gptj", "model_type 'gpt2'; expected gpt2: use --model_spec gpt2, or auto"),
        ("Llama 2, Llama 3", "gpt2", "model_type 'llama'; expected llama3 or llama: use --model_spec llama3, or auto"),
        ("Gemma 3 with vision", "llama3", "model_type 'gemma3_text'; expected gemma: use --model_spec gemma, or auto"),
    ],
)
def test_a_family_that_is_not_the_checkpoints_is_refused_with_the_right_one(
    family: str, asked: str, right: str
) -> None:
    """The paths of several families are the same, so that a wrong name would work and be recorded."""
    with pytest.raises(InputError) as caught:
        resolve(zoo(family), asked)
    assert str(caught.value) == (f"--model_spec {asked!r} does not fit this checkpoint, whose config says {right}")


def test_an_unknown_spec_names_the_known_ones() -> None:
    with pytest.raises(InputError, match="unknown family; expected one of auto, llama3"):
        resolve(llama(300), "lama")


@pytest.mark.parametrize("name", ["llama3", "llama", "auto"])
def test_every_name_of_a_family_resolves_to_one(name: str) -> None:
    assert resolve(llama(300), name).family == "llama3"


def test_a_model_type_that_no_spec_has_is_generic_under_every_name() -> None:
    model = zoo("Nemotron")
    assert resolve(model, "llama3").family == resolve(model, "auto").family == "generic"
    assert resolve(model, "llama3").blocks == resolve(model, "auto").blocks
    assert "its blocks were found where llama3 has them" in resolve(model, "llama3").notes[0]


@pytest.mark.parametrize("spec", ["gpt2", "neox"])
def test_blocks_that_are_not_where_a_named_spec_has_them_are_found_by_their_shape(spec: str) -> None:
    arch = resolve(zoo("Nemotron"), spec)
    assert arch.n_layers == 3
    assert "found by their shape" in arch.notes[0]


def test_a_known_family_with_its_blocks_elsewhere_keeps_its_depth_and_says_so() -> None:
    class Elsewhere(tf.LlamaForCausalLM):
        def __init__(self, inner: tf.LlamaForCausalLM) -> None:
            super().__init__(inner.config)
            self.model = torch.nn.Module()  # type: ignore[assignment]
            self.inner, self.lm_head = inner.model, inner.lm_head

        def get_output_embeddings(self) -> torch.nn.Module:
            return self.lm_head

    arch = resolve(Elsewhere(llama(300)), "llama3")
    assert (arch.n_layers, arch.family) == (3, "llama3")
    assert arch.notes == ("the blocks are not where family llama3 has them; they were found by their shape",)


def test_a_hybrid_says_which_layers_have_heads() -> None:
    arch = resolve(tiny_model("qwen3_next"), "auto")
    assert (arch.n_layers, [*arch.out_projs], [*arch.attentions]) == (4, [1, 3], [1, 3])
    assert "attention heads are in layers 1, 3 of 0 to 3" in arch.notes[1]


def test_layers_that_share_an_attention_module_are_refused() -> None:
    model = llama(300)
    model.model.layers[2].self_attn = model.model.layers[0].self_attn
    with pytest.raises(InputError, match="its layers 0 and 2 share one attention module"):
        resolve(model, "auto")


def test_heads_of_two_widths_are_refused() -> None:
    model = zoo("Nemotron")
    model.model.layers[1].self_attn.o_proj = torch.nn.Linear(24, 48)
    with pytest.raises(InputError, match="inputs of width 24, 48 for 4 heads; expected the same number of equal"):
        resolve(model, "auto")


def test_a_list_with_as_many_entries_as_layers_is_not_taken_for_the_blocks() -> None:
    model = zoo("Nemotron")
    model.heads = torch.nn.ModuleList(torch.nn.Linear(48, 300) for _ in range(3))
    assert resolve(model, "auto").blocks == tuple(model.model.layers)
