"""The demo model with one head alone that can carry a relation, and the relations that it knows."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import ROOT
from relfv.models.sources import model_source
from relfv.relations import load_relations
from relfv.types import HeadId

RELATIONS = load_relations(ROOT / "datasets/relation/relationA_ex.csv")


def leave_one_head_after_layer_1(planted: HeadId, folder: Path) -> list[HeadId]:
    """Save the demo model with only ``planted`` able to write in layers 2 to 7 -> the 95 heads that cannot.

    Layers 0 and 1 stay, because it reads what they write.
    """
    source = model_source("demo")
    model = AutoModelForCausalLM.from_pretrained(source)
    width = model.config.head_dim
    dead = [HeadId(layer, head) for layer in range(2, 8) for head in range(16) if HeadId(layer, head) != planted]
    for layer, head in ((head.layer, head.head) for head in dead):
        model.model.layers[layer].self_attn.o_proj.weight.data[:, head * width : (head + 1) * width] = 0
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return dead
