"""Values of data files are texts as they are written. Run: `python -m pytest tests/training/test_values.py`"""

import pytest

from training.data.conversations import unrolled
from training.data.values import matches, parse_json, text_of


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ('"2024-01-01"', "2024-01-01"), ('"007"', "007"), ('"None"', "None"), ("5", "5"), ("5.0", "5.0"),
        ("2.50", "2.50"), ("1e3", "1e3"), ("12345678901234567890", "12345678901234567890"), ("true", "true"),
        ("null", ""), ('""', ""),
    ],
)  # fmt: skip
def test_json_is_trained_on_as_it_is_written(written, text):
    assert text_of(parse_json(written), typed=False) == text


def test_numbers_match_by_value_and_texts_by_characters():
    assert matches(parse_json("5.0"), [5]) and matches(parse_json("5"), [5]) and matches(None, [None])
    assert not matches("5.0", [5]) and not matches("None", [None]) and not matches(parse_json("5"), [50])


def test_every_answer_has_the_whole_conversation_before_it():
    turns = [{"role": role, "content": str(n)} for n, role in enumerate(("user", "assistant") * 3)]
    pairs, skipped = unrolled(turns)
    assert skipped == 0 and [(pair["prompt"], pair["completion"]) for pair in pairs] == [
        (turns[:place], [turns[place]]) for place in (1, 3, 5)
    ]
