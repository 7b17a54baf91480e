"""How numbers and sentences are written."""

from __future__ import annotations

from relfv.words import first_sentence


def test_the_first_sentence_of_a_verdict_ends_at_no_number() -> None:
    assert first_sentence("P goes from 0.99 to 0.36: 100% (95% CI 0.1 to 0.3). So 2 of 3. 4 more.") == (
        "P goes from 0.99 to 0.36: 100% (95% CI 0.1 to 0.3)."
    )
    assert first_sentence("One alone, of 0.5") == "One alone, of 0.5"
