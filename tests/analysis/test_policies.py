"""Policies as users write them."""

import pytest

from unclamp.analysis.whatif import grid, parse_policy, policy_text
from unclamp.errors import RecipeError
from unclamp.scaling import MX, Delayed, Dynamic, Guarded, HighPrecision, PerBlock, Scaling, Static


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("delayed", Delayed()),
        ("delayed(1024)", Delayed(1024)),
        ("delayed(history_len=1024, margin=1)", Delayed(1024, margin=1)),
        (" guarded( 4 , power_of_two = true ) ", Guarded(4, power_of_two=True)),
        ("delayed(reduce=most_recent)", Delayed(reduce="most_recent")),
        ("dynamic(1x128)", Dynamic(PerBlock(1, 128))),
        ("dynamic('mx')", Dynamic(MX())),
        ("static(2.5)", Static(2.5)),
        ("high_precision", HighPrecision()),
    ],
)
def test_a_policy_is_read_and_written(text: str, policy: Scaling) -> None:
    assert parse_policy(text) == policy
    assert parse_policy(policy_text(policy)) == policy


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("delayd(3)", "unknown policy 'delayd'.*did you mean 'delayed'"),
        ("delayed(margn=1)", "did you mean 'margin'"),
        ("delayed(16", "expected a policy such as"),
        ("", "expected a policy such as"),
        ("delayed(16, 3)", "which setting of delayed is '3'"),
        ("delayed(16, history_len=3)", "history_len is given twice"),
        ("delayed(16,, 3)", "expected settings such as"),
        ("delayed(0)", "history_len"),
        ("static", "scale"),
    ],
)
def test_what_is_no_policy_is_said(text: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        parse_policy(text)


def test_a_grid_has_about_two_hundred_policies_that_differ() -> None:
    texts = [policy_text(policy) for policy in grid()]
    assert 180 <= len(texts) == len(set(texts)) <= 220
    assert [parse_policy(text) for text in texts] == grid()
