"""When the guard saves, and when it ends a run."""

from __future__ import annotations

import numpy as np
import pytest

from blip_ft.simulate.guard import Guard, Limits

NUMBERS = np.array([14, 8, 8])


def events(guard: Guard, worst: list[float]) -> list[str]:
    out = []
    for i, value in enumerate(worst):
        guard.see(10 * i, NUMBERS, np.array([0.01, value, 0.02]), None)
        out.append(guard.event)
    return out


def test_it_ends_a_run_after_patience_in_a_row():
    guard = Guard(Limits(stop=1.0, patience=3))
    assert events(guard, [1.5, 1.5, 0.5, 1.5, 1.5, 1.5]) == ["", "", "", "", "", "stop"]
    assert guard.reason == (
        "step 50: total std of the force of atom 1 (O) is 1.5 eV/Å, above 1 eV/Å in 3 error bars in a row"
    )
    assert (guard.worst_atom, guard.largest_std) == (1, 1.5)


def test_it_ends_a_run_at_once_far_above():
    guard = Guard(Limits(stop=1.0, patience=3))
    assert events(guard, [0.5, 2.5]) == ["", "stop"]
    assert "in one error bar, and far" in guard.reason


def test_it_saves_once_in_a_while():
    guard = Guard(Limits(save=1.0, patience=3))
    assert events(guard, [0.5, 1.5, 1.5, 1.5, 1.5, 0.5, 0.5, 0.5, 1.5]) == [
        *("", "save", "", "", "save"),
        *("", "", "", "save"),
    ]
    assert guard.saved == 3
    assert not guard.reason


def test_thresholds_themselves_are_not_above():
    assert events(Guard(Limits(save=1.0, stop=1.0, patience=1)), [1.0]) == [""]


def test_it_watches_scores():
    guard = Guard(Limits("ood_score", save=2.0, stop=3.0, patience=1))
    guard.see(0, NUMBERS, np.array([9.0, 9.0, 9.0]), np.array([1.0, 2.5, np.inf]))
    assert guard.event == "stop"
    assert "ood_score of atom 2 (O) is inf, above 3 in" in guard.reason


def test_scores_that_have_grown_ask_for_error_bars():
    guard = Guard(Limits(suspect=2.0))
    assert not guard.due(None)
    assert not guard.due(np.array([1.9, 0.0]))
    assert guard.due(np.array([2.1, 0.0]))
    guard.see(0, NUMBERS, None, np.array([2.1, 0.0, 0.0]))
    assert not guard.due(np.array([3.1, 0.0]))
    assert guard.due(np.array([3.2, 0.0]))
    guard.see(0, NUMBERS, None, np.array([0.5, 0.0, 0.0]))
    assert guard.due(np.array([2.1, 0.0]))


def test_what_it_remembers_goes_on():
    limits = Limits(save=1.0, stop=2.0, patience=3)
    values = [1.5, 2.5, 1.5, 2.5, 2.5, 2.5]
    whole = Guard(limits)
    expected = events(whole, values)
    for cut in range(1, 6):
        first = Guard(limits)
        got = events(first, values[:cut])
        second = Guard(limits, **first.to_dict())
        assert got + events(second, values[cut:]) == expected
        assert second.largest_std == whole.largest_std


def test_it_says_what_it_does():
    assert Limits().describe() == "guard: off"
    assert Limits(save=0.1, stop=0.15, level=0.05).describe() == (
        "guard: total std of the force of an atom; saves frames above 0.1 eV/Å (2 x calibration frames), "
        "stops above 0.15 eV/Å (3 x calibration frames)"
    )


def test_a_run_without_a_signal_goes_on():
    guard = Guard(Limits(stop=1.0))
    guard.see(0, NUMBERS, None, None)
    assert (guard.event, guard.worst_atom) == ("", None)
    assert guard.now is None


@pytest.mark.parametrize("signal", ["forces_std", "ood_score"])
def test_not_a_number_is_above_nothing_but_infinity_is(signal: str):
    guard = Guard(Limits(signal, stop=1.0, patience=1))  # type: ignore[arg-type]
    guard.see(0, NUMBERS, np.array([0.0, np.inf, 0.0]), np.array([0.0, np.inf, 0.0]))
    assert guard.event == "stop"
