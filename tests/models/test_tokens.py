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


@pytest.mark.parametrize("bos", [True, False])
def test_texts_read_ahead_have_the_ids_that_each_has_alone(bos: bool) -> None:
    texts = [f"Q: {a}\nA:{' ' * n}{b}" for a, b in [*WORDS, *PLACES] for n in (0, 1)]
    _same_ahead(make_tokenizer(bos=bos), texts)


def _same_ahead(tokenizer, texts: list[str]) -> None:  # type: ignore[no-untyped-def]
    ahead, alone = Tokens(tokenizer), Tokens(tokenizer)
    ahead.read_ahead(texts)
    assert {text for text, special in ahead._known if special} >= {*texts}
    assert [ahead.encode(text) for text in texts] == [alone.encode(text) for text in texts]


def test_a_trailing_space_is_not_fed() -> None:
    tokens = Tokens(make_tokenizer())
    assert tokens.encode("Q: dog\nA: ") == tokens.encode("Q: dog\nA:")
    assert fed_text("A: ") == fed_text("A:") == "A:"


@pytest.mark.parametrize("pair", [*WORDS, *PLACES])
def test_the_first_token_is_the_one_after_the_prompt_in_the_joint_text(pair: tuple[str, str]) -> None:
    tokens = Tokens(make_tokenizer())
    (space,) = tokens.tokenizer(" ", add_special_tokens=False).input_ids
    prompt = f"Q: {pair[0]}\nA:"
    target = tokens.target(prompt, pair[1])
    assert target.joint
    assert [*tokens.encode(prompt), *target.space_ids, *target.answer_ids] == tokens.encode(f"{prompt} {pair[1]}")
    assert target.token_id == target.answer_ids[0]
    assert tokens.tokenizer.decode([*target.space_ids, *target.answer_ids]) == f" {pair[1]}"
    assert tokens.tokenizer.decode([target.token_id]).strip()
    assert bool(target.space_ids) == (tokens.encode(f"{prompt} {pair[1]}")[len(tokens.encode(prompt))] == space)


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


@pytest.fixture(scope="module", params=["byte-level", "sentencepiece-like"])
def digits_apart(request: pytest.FixtureRequest) -> Tokens:
    """Real tokenizers that split digits off, as Llama-3's (byte-level) and Gemma's (metaspace) do."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE(unk_token=None))
    digit = pre_tokenizers.Split(Regex("[0-9]"), "isolated")
    if request.param == "byte-level":
        words = pre_tokenizers.Split(Regex(r" ?\p{L}+|\n+|[^\p{L}\n]"), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        raw.pre_tokenizer = pre_tokenizers.Sequence([digit, words, byte_level])
        raw.decoder = decoders.ByteLevel()
    else:
        metaspace = pre_tokenizers.Metaspace(prepend_scheme="never")
        raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split("\n", "isolated"), metaspace, digit])
        raw.decoder = decoders.Metaspace(prepend_scheme="never")
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<bos>", "<eos>"], show_progress=False)
    text = [f"Q: {word}\nA: {answer}\n\n" for word in ("otter", "key") for answer in ("5", "17", "puppy")] * 9
    raw.train_from_iterator([*text, "0123456789"], trainer)
    return Tokens(PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>"))


def test_so_have_those_of_tokenizers_that_split_digits_off(digits_apart: Tokens) -> None:
    _same_ahead(digits_apart.tokenizer, ["Q: otter\nA:", "Q: otter\nA: ", "Q: key\nA: 17", "", "5"])


@pytest.mark.parametrize("answer", ["5", "17"])
def test_a_space_that_is_a_token_of_its_own_is_fed_and_the_digit_is_scored(digits_apart: Tokens, answer: str) -> None:
    prompt = "Q: otter\nA: "
    target = digits_apart.target(prompt, answer)
    assert [*digits_apart.encode(prompt), *target.space_ids, *target.answer_ids] == digits_apart.tokenizer(
        f"Q: otter\nA: {answer}"
    ).input_ids
    assert len(target.space_ids) == 1
    assert digits_apart.text(target.token_id) == answer[0]
    assert digits_apart.fed(prompt, target.fed_ids) == prompt
    word = digits_apart.target(prompt, "puppy")
    assert word.space_ids == ()
    assert digits_apart.fed(prompt, word.fed_ids) == prompt.rstrip()


@pytest.mark.parametrize(
    ("written", "answer"),
    [("17\n\nQ", "17"), ("17", None), (" 17 \n", "17"), ("\n", ""), ("5<eos>7", "5"), ("17 puppy\n", "17 puppy")],
)
def test_an_answer_is_what_stands_before_the_first_end(digits_apart: Tokens, written: str, answer: str | None) -> None:
    ids = digits_apart.tokenizer(written, add_special_tokens=False).input_ids
    assert digits_apart.answer_in(ids) == answer
