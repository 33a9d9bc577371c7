import itertools
import math
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from experiments.launch import axes

SUPER = "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"
PLAIN = {**str.maketrans(SUPER, "-0123456789"), 107: "e3", 77: "e6", 71: "e9", 84: "e12"}  # kMGT


def test_a_logarithmic_scale_by_hand():
    scale = axes.Scale(1.0, 1e4, 0.0, 100.0, log=True)
    np.testing.assert_allclose(scale(np.array([1, 10, 1e3, 1e6, -3])), [0, 25, 75, 100, 0])


def test_moving_averages_are_those_of_the_window():
    y = np.append(np.random.default_rng(0).standard_normal(99), math.nan)
    _, means = axes.moving_average(np.arange(100.0), y, 21, points=100)
    windows = np.lib.stride_tricks.sliding_window_view(y, 21)
    np.testing.assert_allclose(means[10:-10], np.nanmean(windows, axis=1))


@given(st.floats(-10, 10), st.floats(-10, 10), st.integers(-12, 15), st.integers(5, 8))
def test_ticks_are_round_and_their_labels_tell_them(a, b, exponent, count):
    assume(abs(b - a) > 2e-4)
    low, high = sorted((a * 10.0**exponent, b * 10.0**exponent))
    found = axes.ticks(low, high, count)
    assert all(low <= v <= high for v in found) and 2 <= len(found) <= count + 1
    exact = [Decimal(repr(v)) for v in found]
    (step,) = {(y - x).normalize() for x, y in itertools.pairwise(exact)}
    assert step.as_tuple().digits in ((1,), (2,), (5,)) and all(v % step == 0 for v in exact)
    for value, label in zip(exact, axes.tick_labels(found), strict=True):
        assert Decimal(label.translate(PLAIN).replace("·10", "e")) == value
    if low > 0:
        powers = axes.log_ticks(low, high)
        assert all(low <= v <= high and f"{v:.6e}".startswith("1.000000e") for v in powers)
        assert len(powers) >= min(2, math.floor(math.log10(high) - math.log10(low)))


@given(st.integers(0, 999), st.integers(1, 400), st.integers(1, 40))
def test_thinning_keeps_ends_extremes_and_gaps(seed, n, buckets):
    y = np.random.default_rng(seed).standard_normal(n)
    y[seed % n] = math.nan
    x, kept = axes.thin(np.arange(n), y, buckets)
    assert len(x) <= 3 * buckets + 2 and (np.diff(x) > 0).all()
    assert x[0] == 0 and x[-1] == n - 1 and np.isnan(kept).any()
    np.testing.assert_array_equal(kept, y[x])
    for extreme in (np.fmin.reduce, np.fmax.reduce):  # they pass NaN over
        np.testing.assert_array_equal(extreme(kept), extreme(y))


def test_axes_are_logarithmic_beyond_two_decades_and_leave_spikes_out():
    for y, expected in [
        (np.linspace(1, 90, 50), (0.0, 93.56, False)),
        (np.linspace(80, 80.1, 50), (79.996, 80.104, False)),
        (np.append(np.geomspace(1, 1e4, 50), 0.0), (10**-0.12, 10**4.12, True)),
        (np.append(np.linspace(1, 2, 50), [1e6]), (0.96, 2.04, False)),
        (np.array([7.0, 7.00001]), (0.0, 14.00002, False)),
    ]:
        assert axes.axis_range(y) == pytest.approx(expected, rel=1e-9)
