from __future__ import annotations

from relfv.models.families import FAMILIES


def test_every_family_the_spec_names_is_there() -> None:
    wanted = {"llama3", "llama", "gpt2", "gptj", "neox", "gemma", "mistral", "qwen2", "qwen3", "olmo", "phi3"}
    assert wanted <= set(FAMILIES)


def test_model_types_name_their_family_except_where_two_specs_share_one() -> None:
    """``auto`` takes the first spec that has the model_type."""
    model_types = [model_type for spec in FAMILIES.values() for model_type in spec.model_types]
    assert [name for name in dict.fromkeys(model_types) if model_types.count(name) > 1] == ["llama"]
    assert next(iter(FAMILIES)) == "llama3"
