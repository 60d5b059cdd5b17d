import pytest

from support.near_ties import NEAR_TIE, Step, same_or_near_tie


def step(token: str, other: str, behind: float) -> Step:
    """Greedy: `token` is the best, `other` that many nats behind it."""
    return Step(token, {token: -0.5, other: -0.5 - behind})


SURE, CLEAR, TIED = 4.0, NEAR_TIE * 1.1, NEAR_TIE / 2


def test_the_same_is_the_same() -> None:
    answer = [step("a", "b", SURE), step("a", "b", TIED)]
    assert same_or_near_tie(answer, answer)


def test_a_near_tie_may_go_either_way_and_what_follows_is_another_answer() -> None:
    assert same_or_near_tie([step("a", "b", TIED), step("a", "b", SURE)], [step("b", "a", TIED), step("y", "z", SURE)])


@pytest.mark.parametrize(("first", "second"), [(CLEAR, CLEAR), (TIED, CLEAR), (CLEAR, TIED)])
def test_a_difference_at_a_clear_margin_is_one(first: float, second: float) -> None:
    assert not same_or_near_tie([step("a", "b", first)], [step("b", "a", second)])


def test_a_token_that_was_in_no_doubt_is_a_difference() -> None:
    assert not same_or_near_tie([step("a", "b", TIED)], [step("c", "a", TIED)])


def test_a_clear_difference_before_a_near_tie_is_one() -> None:
    assert not same_or_near_tie([step("a", "b", SURE), step("a", "b", TIED)], [step("b", "a", SURE)])


def test_an_end_is_a_choice_too() -> None:
    assert same_or_near_tie([step("a", "b", SURE)], [step("a", "b", SURE), step("a", "end", TIED)])
    assert not same_or_near_tie([step("a", "b", SURE), step("a", "end", CLEAR)], [step("a", "b", SURE)])
