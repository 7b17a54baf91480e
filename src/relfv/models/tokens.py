"""Prompts to token ids, and what first-token scoring depends on: which token is the first of an answer.

BOS is what the tokenizer adds by default: once, or not at all. The space before an answer belongs to the answer's
first token (" egg"), so prompts are tokenised without a trailing space. Where the tokenizer makes a token of that space
alone (" " and "7"), the space is fed as the end of the prompt, and the token after it is scored.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from relfv.errors import InputError
from relfv.types import Target

_KNOWN = 1024
"""Number of texts whose ids are kept: a q_id's stages read the same prompts several times."""


class Tokens:
    """A tokenizer, used as relfv needs it."""

    def __init__(self, tokenizer: Any, n_embeddings: int | None = None) -> None:
        """``n_embeddings``: the number of token ids that the model knows; None to leave ids unchecked. Raises
        InputError as ``require_tokenizer`` does."""
        require_tokenizer(tokenizer)
        self.tokenizer = tokenizer
        self._n_embeddings = n_embeddings
        self._texts: dict[int, str] = {}
        self._known: dict[tuple[str, bool], list[int]] = {}
        others = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token]
        unknown = None if tokenizer.unk_token in others else tokenizer.unk_token
        self._special = [text for text in tokenizer.all_special_tokens if text.strip() and text != unknown]
        ends = [tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id]
        self._ends = {token_id for token_id in ends if token_id is not None}
        # Some tokenizers add a token (EOS) after every text. The last token that the model reads must be the prompt's,
        # so whatever is added after the text is cut off.
        plain = self._ids("a", special=False)
        decorated = self._ids("a", special=True)
        self._n_suffix = 0
        for start in range(len(decorated) - len(plain) + 1):
            if decorated[start : start + len(plain)] == plain:
                self._n_suffix = len(decorated) - start - len(plain)

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a prompt, with BOS if the tokenizer adds it.

        A trailing space is dropped: ``Q: x\\nA: `` is fed as ``Q: x\\nA:``.
        """
        return self._encode(fed_text(prompt))

    def read_ahead(self, texts: Iterable[str]) -> None:
        """Find the ids of some texts in one call of a fast tokenizer, most of whose time a call takes."""
        new = [text for text in dict.fromkeys(texts) if (text, True) not in self._known]
        if getattr(self.tokenizer, "is_fast", False) and 0 < len(new) <= _KNOWN:
            if len(self._known) + len(new) > _KNOWN:
                self._known.clear()
            self._known |= {(text, True): ids for text, ids in zip(new, self._made(new, special=True), strict=True)}

    def ends(self, prompt: str) -> list[int]:
        """Position in the text at which each token of ``encode(prompt)`` ends. Raises InputError for a tokenizer that
        cannot tell."""
        text = fed_text(prompt)
        if not getattr(self.tokenizer, "is_fast", False):
            raise InputError(
                f"{type(self.tokenizer).__name__} does not say which text a token stands for; expected a tokenizer "
                "with a tokenizer.json"
            )
        offsets = self.tokenizer(text, add_special_tokens=True, return_offsets_mapping=True)["offset_mapping"]
        return [end for _, end in offsets[: len(self._encode(text))]]

    def require_plain(self, word: str) -> None:
        """Raise InputError for a word that contains a special token's text: it would become a second BOS, say."""
        for text in self._special:
            if text in word:
                raise InputError(f"the word {word!r} contains {text!r}, a special token of this tokenizer")

    def target(self, prompt: str, answer: str) -> Target:
        """All tokens of ``answer`` after ``prompt``, from tokenising both as one text.

        The prompt's ids must be a prefix of the joint ids, element by element; where the tokenizer merges across the
        boundary the answer is tokenised alone and ``Target.joint`` is False. Raises InputError for an answer that
        gives no token.
        """
        text = fed_text(prompt)
        prompt_ids, joint_ids = self._encode(text), self._encode(f"{text} {answer}")
        joint = joint_ids[: len(prompt_ids)] == prompt_ids
        answer_ids = joint_ids[len(prompt_ids) :] if joint else self._ids(" " + answer, special=False)
        spaced_ids = self._encode(text + " ")
        n_space = len(spaced_ids) - len(prompt_ids) if joint and joint_ids[: len(spaced_ids)] == spaced_ids else 0
        if len(answer_ids) <= n_space:
            raise InputError(f"the answer {answer!r} gives no token after {text[-40:]!r}")
        return Target(tuple(answer_ids[n_space:]), joint, space_ids=tuple(answer_ids[:n_space]))

    def text(self, token_id: int) -> str:
        """The text of one token; empty for an id that only the model knows (vocabularies are padded)."""
        if token_id not in self._texts:
            self._texts[token_id] = self.joined([token_id])
        return self._texts[token_id]

    def joined(self, token_ids: Sequence[int]) -> str:
        """The text of several tokens; ids that only the model knows are skipped."""
        return self.tokenizer.decode([token_id for token_id in token_ids if token_id < len(self.tokenizer)])

    def fed(self, prompt: str, more: Sequence[int]) -> str:
        """The text that the model reads of a prompt and of ``more`` tokens after it."""
        if not more:
            return fed_text(prompt)
        ids = self.encode(prompt)  # some tokenizers drop the space in front of tokens decoded alone
        return fed_text(prompt) + self.joined([*ids, *more]).removeprefix(self.joined(ids))

    def answer_in(self, token_ids: Sequence[int]) -> str | None:
        """The answer that a model gives by writing these tokens: the text before the first line break or token that
        ends texts, without spaces around it. None if it has not ended yet."""
        ends = (n for n, token_id in enumerate(token_ids) if token_id in self._ends)
        end = next(ends, None)
        text, line_break, _ = self.joined(token_ids[:end]).partition("\n")
        return None if end is None and not line_break else text.strip()

    def self_check_prompts(self, longest: int | None = None) -> list[list[int]]:
        """Two prompts of different length, in the format of real ones and of at most ``longest`` tokens, for the
        engine's self-check."""
        words = ["up", "down", "hot", "cold", "day", "night", "old", "new", "left", "right", "big", "small"]
        pairs = [f"Q: {a}\nA: {b}\n\n" for a, b in pairwise(words)]
        prompts = [self.encode("".join(pairs) + "Q: in\nA:"), self.encode(pairs[0] + "Q: high\nA:")]
        room = min(longest or len(prompts[0]), len(prompts[0]))
        return [prompts[0][:room], prompts[1][: max(1, room - 1)]]

    def require_known(self, ids: Iterable[int]) -> None:
        """Raise InputError for an id that the model has no embedding of, which on a GPU would end the whole process."""
        for token in ids:
            if token < 0 or (self._n_embeddings is not None and token >= self._n_embeddings):
                known = "at least 0" if self._n_embeddings is None else f"0 to {self._n_embeddings - 1}"
                raise InputError(f"token id {token}: expected one that the model knows, {known}")

    def _encode(self, text: str) -> list[int]:
        ids = self._ids(text, special=True)
        return ids[: len(ids) - self._n_suffix] if self._n_suffix else ids

    def _ids(self, text: str, *, special: bool) -> list[int]:
        if (text, special) not in self._known:
            if len(self._known) >= _KNOWN:
                self._known.clear()
            (self._known[text, special],) = self._made([text], special=special)
        return list(self._known[text, special])

    def _made(self, texts: Sequence[str], *, special: bool) -> list[list[int]]:
        given = self.tokenizer(texts if len(texts) > 1 else texts[0], add_special_tokens=special).input_ids
        of_texts = [list(ids) for ids in (given if len(texts) > 1 else [given])]
        for text, ids in zip(texts, of_texts, strict=True):
            # On a GPU, the look-up of an id that is too large would end the whole process.
            if self._n_embeddings is not None and max(ids, default=0) >= self._n_embeddings:
                raise InputError(
                    f"the tokenizer gives {text[-40:]!r} the token id {max(ids)}, and the model has only "
                    f"{self._n_embeddings} embeddings; expected the tokenizer that the model was made with"
                )
        return of_texts


def fed_text(prompt: str) -> str:
    """The text that the model reads: the prompt without the space that belongs to the answer."""
    return prompt.removesuffix(" ")


def require_tokenizer(tokenizer: Any) -> None:
    """Raise InputError for an object that is no transformers tokenizer, and for one that knows special tokens alone.

    Such a one is what transformers makes for some families where a model's folder holds no tokenizer."""
    if not hasattr(tokenizer, "all_special_tokens"):
        found = "None" if tokenizer is None else f"a {type(tokenizer).__name__}"
        raise InputError(
            f"tokenizer is {found}; expected the model's own transformers tokenizer, tokenizer=... (of a processor its "
            ".tokenizer)"
        )
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise InputError(
            f"{type(tokenizer).__name__} knows no text, only {len(tokenizer)} special token(s), as where a tokenizer's "
            "files are missing; expected tokenizer.json, tokenizer.model, or vocab.json and merges.txt beside the "
            "model's config.json"
        )
