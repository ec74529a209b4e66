"""A rule as a value, as text and as plain data."""

import pytest

from unclamp import Delayed, Dynamic, Guarded, HighPrecision, PerBlock, RecipeError, Rule
from unclamp.analysis.steering import parse_rule


@pytest.mark.parametrize(
    "rule",
    [
        Rule(),
        Rule(tolerance=0.25, casts=2, of=5, floor=0, reads=1.05),
        Rule(price=0.01, recasts=3, recasts_of=4),
        Rule(ladder=(Delayed(1024, margin=1), Guarded(4), Dynamic(PerBlock(1, 128)),
                     HighPrecision())),
    ],
    ids=["plain", "counts", "price", "ladder"],
)  # fmt: skip
def test_a_rule_is_read_back_from_its_text_and_from_its_data(rule: Rule) -> None:
    assert parse_rule(str(rule)) == rule
    assert Rule.from_dict(rule.to_dict()) == rule


def test_a_text_says_what_differs() -> None:
    rule = parse_rule(" floor=20,ladder = delayed(history_len=8, margin=1)>dynamic , price=none")
    assert rule == Rule(floor=20, ladder=(Delayed(8, margin=1), Dynamic()))
    assert parse_rule("") == Rule()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tolerence=0.1", "did you mean 'tolerance'"),
        ("floor", "expected settings such as"),
        ("floor=1, floor=2", "given twice"),
        ("tolerance=2", r"expected a tolerance in \[0, 1\], got 2"),
        ("reads=0.5", r"expected a reads in \[1, inf\]"),
        ("casts=3, of=2", "at most as many casts"),
        ("floor=1.5", "expected an integer floor"),
        ("ladder=dynamic", "two scalings or more"),
        ("ladder=delayed > delayed", "each once"),
        ("ladder=dynamic > delayed", "no rung that clamps above"),
        ("ladder=guarded(granularity=128x128) > dynamic", "amaxes of blocks are not shared"),
        ("ladder=delaid > dynamic", "did you mean 'delayed'"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_sentence(text: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        parse_rule(text)
