"""Which weights are the best, and when to stop looking for better ones."""

import math

import pytest

from flowmo_diffusers.engine.best import Best


def follow(best: Best, *values: float) -> list[bool]:
    """Whether each is the best so far, as validations of steps 10, 20, ... that follow those there were."""
    return [best.update(value, 10 * i) for i, value in enumerate(values, start=1)]


def test_less_is_better():
    """Catches the worst weights kept for the best, ones no better than the best replacing it, or a step not theirs."""
    best = Best()
    assert follow(best, 3.0, 2.0, 2.0, 2.5, 1.0, 1.5) == [True, True, False, False, True, False]
    assert (best.value, best.step) == (1.0, 50)
    assert follow(Best(), -20.0, -21.0) == [True, True]  # a figure of which more is better, with its sign changed


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_figure_is_never_the_best(value):
    """Catches a run gone astray whose weights are kept, even as the first, or that nothing is better than any more."""
    best = Best(patience=2)
    assert follow(best, value, 1.0, value, 0.5, value) == [False, True, False, True, False]
    assert (best.value, best.step, best.exhausted) == (0.5, 40, False)
    assert follow(best, value) == [False]
    assert best.exhausted


def test_patience():
    """Catches a run that stops a validation early or late, or where better ones lie between."""
    best = Best(patience=2)
    assert not best.exhausted
    for value, exhausted in ((1.0, False), (1.1, False), (0.9, False), (0.9, False), (1.0, True), (0.5, False)):
        best.update(value, 0)
        assert best.exhausted == exhausted
    patient = Best()
    follow(patient, *[1.0] * 100)
    assert not patient.exhausted


def test_best_resumes():
    """Catches a resumed run that takes its first validation for the best, or begins its patience anew."""
    best = Best(patience=3)
    follow(best, 1.0, 2.0, 2.0)
    resumed = Best(patience=3)
    resumed.load_state_dict(best.state_dict())
    assert resumed.step == 10 and not resumed.exhausted
    assert follow(resumed, 1.5) == [False] and resumed.exhausted
    other = Best(patience=1)
    other.load_state_dict(best.state_dict())
    assert other.exhausted  # patience is of this run
