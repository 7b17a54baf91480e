from __future__ import annotations

import pytest

from conftest import PLACES, WORDS, make_tokenizer
from relfv.errors import InputError
from relfv.models.tokens import Tokens, fed_text


def test_bos_comes_once_if_the_tokenizer_has_one_and_not_at_all_otherwise() -> None:
    with_bos, without = Tokens(make_tokenizer()), Tokens(make_tokenizer(bos=False))
    assert with_bos.encode("Q: dog\nA:").count(0) == 1
    assert with_bos.encode("Q: dog\nA:")[0] == 0
    assert without.encode("Q: dog\nA:") == with_bos.encode("Q: dog\nA:")[1:]


def test_a_token_that_the_tokenizer_puts_at_the_end_is_not_the_last_token_of_the_prompt() -> None:
    from tokenizers import processors

    tokenizer = make_tokenizer()
    plain = Tokens(make_tokenizer()).encode("Q: dog\nA:")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <bos>", special_tokens=[("<bos>", 0)]
    )
    assert Tokens(tokenizer).encode("Q: dog\nA:") == plain


def test_a_trailing_space_is_not_fed() -> None:
    tokens = Tokens(make_tokenizer())
    assert tokens.encode("Q: dog\nA: ") == tokens.encode("Q: dog\nA:")
    assert fed_text("A: ") == fed_text("A:") == "A:"


@pytest.mark.parametrize("pair", [*WORDS, *PLACES])
def test_the_first_token_is_the_one_after_the_prompt_in_the_joint_text(pair: tuple[str, str]) -> None:
    tokens = Tokens(make_tokenizer())
    prompt = f"Q: {pair[0]}\nA:"
    target = tokens.target(prompt, pair[1])
    assert target.joint
    assert tokens.encode(prompt) + list(target.answer_ids) == tokens.encode(f"{prompt} {pair[1]}")
    assert target.first_token_id == target.answer_ids[0]
    assert tokens.tokenizer.decode(target.answer_ids) == f" {pair[1]}"


def test_a_tokenizer_that_merges_across_the_boundary_is_noticed_by_ids_not_by_length() -> None:
    """Metaspace without pre-splitting merges 'A:' with what follows; the prompt's ids are then no prefix."""
    from tokenizers import Tokenizer, models, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>"], show_progress=False)
    raw.train_from_iterator(["Q: x\nA: puppy\n\n"] * 50, trainer)
    tokens = Tokens(PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>"))
    prompt = "Q: x\nA:"
    assert tokens.encode(prompt + " puppy")[: len(tokens.encode(prompt))] != tokens.encode(prompt)
    target = tokens.target(prompt, "puppy")
    assert not target.joint
    assert list(target.answer_ids) == tokens.tokenizer(" puppy", add_special_tokens=False).input_ids


def test_an_answer_without_a_token_is_refused() -> None:
    from tokenizers import normalizers

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(" gone", "")
    with pytest.raises(InputError, match="'gone' gives no token"):
        Tokens(tokenizer).target("Q: x\nA:", "gone")


def test_a_word_that_is_a_special_token_is_refused() -> None:
    with pytest.raises(InputError, match="'<bos>', a special token"):
        Tokens(make_tokenizer()).require_plain("<bos> thing")


def test_a_special_token_is_refused_also_where_it_is_the_unknown_token_too() -> None:
    tokenizer = make_tokenizer()
    tokenizer.unk_token = "<bos>"
    with pytest.raises(InputError, match="'<bos>', a special token"):
        Tokens(tokenizer).require_plain("<bos>")
