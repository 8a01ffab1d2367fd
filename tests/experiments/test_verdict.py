"""The rule of the verdicts, on differences whose intervals are worked out by hand."""

import math

import pytest

from experiments.verdict import best_rate, decide, together


def test_three_differences_by_hand():
    v = decide([1.0, 2.0, 3.0], 1.5)  # mean 2, sd 1, half width 2.920 / sqrt(3) = 1.686
    assert v.mean == 2 and v.low == pytest.approx(0.314, abs=1e-3) and v.high == pytest.approx(3.686, abs=1e-3)
    assert v.word == "reproduced"


@pytest.mark.parametrize(
    ("differences", "minimum", "word"),
    [
        ([5.0, 5.1, 4.9], 2.0, "reproduced"),
        ([1.0, 1.1, 0.9], 2.0, "not reproduced"),  # there, but smaller than the effect fixed in advance
        ([-5.0, -5.1, -4.9], 2.0, "not reproduced"),  # the other way round
        ([0.0, 6.0, 3.0], 2.0, "undecided at this size"),  # large enough, too spread out
        ([-1.0, 4.0, 0.0], 2.0, "undecided at this size"),
        ([math.nan, 5.0, 5.0], 2.0, "undecided at this size"),
    ],
)
def test_words(differences, minimum, word):
    assert decide(differences, minimum).word == word


@pytest.mark.parametrize(("differences", "minimum"), [([1.0], 1.0), ([1.0] * 11, 1.0), ([1.0, 2.0], 0.0)])
def test_what_cannot_be_decided_is_refused(differences, minimum):
    with pytest.raises(ValueError):
        decide(differences, minimum)


def test_an_experiment_is_as_good_as_its_weakest_claim():
    assert together(["reproduced", "reproduced"]) == "reproduced"
    assert together(["reproduced", "undecided at this size"]) == "undecided at this size"
    assert together(["undecided at this size", "not reproduced", "reproduced"]) == "not reproduced"
    with pytest.raises(ValueError):
        together([])


def test_the_best_rate_and_of_equals_the_lowest():
    assert best_rate({3e-3: 10.0, 1e-3: 10.0, 1e-2: 9.0}) == 1e-3
    assert best_rate({1e-3: math.nan, 3e-3: 0.0}) == 3e-3
    with pytest.raises(ValueError):
        best_rate({})
