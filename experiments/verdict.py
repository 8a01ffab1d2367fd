"""The rule that decides a claim, written down before any scored run was made.

A claim says that one arm beats another by at least `minimum`, an effect fixed in advance. Both arms run at the same seeds, so that each
seed gives one difference (in the direction of the claim). Over the differences d of n seeds a two-sided 90% interval by Student's t:

    mean(d) -+ t(0.95, n - 1) * sd(d) / sqrt(n)          t = 2.920 for three seeds

    reproduced                   the interval lies above 0, and mean(d) is at least `minimum`
    not reproduced               the interval lies below `minimum`: so large an effect is excluded, or it points the other way
    undecided at this size       anything else

An experiment with several claims is reproduced when all of them are, and not reproduced when any of them is not. Nothing here looks at a
plot, and nobody chooses between claims after the runs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Literal

Word = Literal["reproduced", "not reproduced", "undecided at this size"]

STUDENT_95 = {1: 6.314, 2: 2.920, 3: 2.353, 4: 2.132, 5: 2.015, 6: 1.943, 7: 1.895, 8: 1.860, 9: 1.833}
"""95% points of Student's t by degrees of freedom, from any table."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """word: the result. differences: one per seed, in the direction of the claim. low, high: the 90% interval around `mean`."""

    word: Word
    mean: float
    low: float
    high: float
    minimum: float
    differences: tuple[float, ...]


def decide(differences: Sequence[float], minimum: float) -> Verdict:
    """The verdict on paired differences. Raises ValueError for fewer than 2 or more than 10 of them, or a minimum that is not positive."""
    n = len(differences)
    if n - 1 not in STUDENT_95:
        raise ValueError(f"a verdict needs 2 to 10 paired differences, not {n}; run more seeds of both arms")
    if not minimum > 0:
        raise ValueError(f"the minimum effect is {minimum}; fix a positive one in advance")
    mean = math.fsum(differences) / n
    spread = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (n - 1))
    half = STUDENT_95[n - 1] * spread / math.sqrt(n)
    low, high = mean - half, mean + half
    word: Word = "undecided at this size"
    if low > 0 and mean >= minimum:
        word = "reproduced"
    elif high < minimum:
        word = "not reproduced"
    return Verdict(word, mean, low, high, minimum, tuple(differences))


def together(words: Iterable[Word]) -> Word:
    """The verdict of an experiment on those of its claims. Raises ValueError when there are none."""
    words = list(words)
    if not words:
        raise ValueError("an experiment without claims has no verdict")
    for word in ("not reproduced", "undecided at this size"):
        if word in words:
            return word
    return "reproduced"


def best_rate(scores: dict[float, float]) -> float:
    """Of {learning rate: score at the seed that is not scored} the rate with the highest score, of equals the lowest. NaN never wins."""
    if not scores:
        raise ValueError("no learning rate was tried; run the tuning seed first")
    return max(sorted(scores), key=lambda rate: -math.inf if math.isnan(scores[rate]) else scores[rate])
