"""docs/families.md, whose two tables are written by two tests."""

from __future__ import annotations

from itertools import groupby

from conftest import ROOT
from parity import chosen_engine, injection_gaps, sweep_gaps, truth
from relfv.models.architecture import text_config
from relfv.models.families import FAMILIES
from zoo import ZOO, Animal

PAGE = ROOT / "docs" / "families.md"
EVERY_MODEL = "\n## Every causal language model of transformers "
"""The title of the second table."""

FIRST_TABLE = """# Model families

Written by the tests: `python -m pytest tests/engine/test_parity.py tests/models/test_every_lm.py --write-families`.

Each row was tested with tiny random models (3 layers, prompts of 9 to 23 tokens, windows and chunks of 6): every head
and every layer, by the engine in the row, against one hooked forward pass for each, in float32 on a CPU. *Error* is the
largest difference between the two in `delta_logprob`, where effects reach at least 0.2: `rounding` is at most 64 of
float32's epsilons (1.2e-7) times the largest logit, 1e-4 for a logit of 13; the most seen on any processor was 15.
*Engine* is what the self-check chooses on opening: `shared prefix` is the fast one (all heads in one pass), `reference`
batches the heads of a layer as whole forward passes. Every model goes through that check, so a model that is not in the
table, or a release of transformers that changes one, gets the reference engine instead of wrong numbers.

`--model_spec auto` finds the family by the `model_type` in the checkpoint's config. The families from Nemotron on have
no spec; their blocks are found by their shape, as are those of any model that is not in the table.

In a multimodal checkpoint the text model is measured. A PEFT adapter (a folder with `adapter_config.json`; LoRA and other
kinds that can be merged) is merged into its base model on opening; that needs `pip install 'relfv[peft]'`.

| Family | `model_type` | `--model_spec` | Engine | Error | Tested with |
| --- | --- | --- | --- | --- | --- |
"""  # noqa: E501


def _row(family: str, animals: list[Animal]) -> str:
    """One line of the table: all models of a family."""
    names = [animal.name for animal in animals]
    model_type = text_config(truth(names[0]).backbone.model.config).model_type
    specs = [f"`{spec.name}`" for spec in FAMILIES.values() if model_type in spec.model_types] or ["`auto`"]
    engines = [chosen_engine(name)[0].name for name in names]
    (engine,) = set(engines)
    seen = [gaps(name, engine) for name in names for gaps in (sweep_gaps, injection_gaps)]
    error = "rounding" if all(gap.delta_logprob <= gap.limit for gap in seen) else "wrong"
    special = "; ".join(animal.special for animal in animals)
    shown = engine.replace("_", " ")
    return f"| {family} | `{model_type}` | {', '.join(specs)} | {shown} | {error} | {special} |"


def first_table() -> str:
    """What the page says of the families of the zoo."""
    groups = groupby(ZOO.values(), key=lambda animal: animal.family)
    return FIRST_TABLE + "".join(_row(family, list(animals)) + "\n" for family, animals in groups)
