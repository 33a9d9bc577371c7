"""The toy of two losses, its front, and descents on it, against numpy in float64."""

import jax
import numpy as np
import optax
import pytest

from blogjax.multitask.registry import COMBINERS
from experiments.multitask import two_losses, walks


def losses_of(a, b):
    """As in the code of the paper, written for arrays of coordinates."""
    f1 = np.log(np.maximum(np.abs(0.5 * (-a - 7) - np.tanh(-b)), 0.000005)) + 6
    f2 = np.log(np.maximum(np.abs(0.5 * (-a + 3) + np.tanh(-b) + 2), 0.000005)) + 6
    c1, c2 = np.maximum(np.tanh(b * 0.5), 0), np.maximum(np.tanh(-b * 0.5), 0)
    q1 = ((-a + 7) ** 2 + 0.1 * (-b - 8) ** 2) / 10 - 20
    q2 = ((-a - 7) ** 2 + 0.1 * (-b - 8) ** 2) / 10 - 20
    return np.stack([f1 * c1 + q1 * c2, f2 * c1 + q2 * c2], axis=-1)


def gradients_of(x):
    """By central differences, `[2, 2]`."""
    h = 1e-6 * np.eye(2)
    return np.stack([(losses_of(*(x + d)) - losses_of(*(x - d))) / 2e-6 for d in h], axis=1)


def weights_of(name, g):
    """Of two tasks, in closed form."""
    (g11, g12), (_, g22) = g @ g.T
    if name == "first_only":
        return np.array([1.0, 0.0])
    if name == "mean":
        return np.array([0.5, 0.5])
    if name == "min_norm":
        w = np.clip((g22 - g12) / (g11 + g22 - 2 * g12), 0, 1)
        return np.array([w, 1 - w])
    if name == "primary_auxiliary":
        return np.array([1.0, max(-g12, 0) / g22])
    assert name == "mixed"
    return np.array([max(-g12, 0) / g11, 1.0])


def descend(name, start, steps, *, rate, adam=False, eps=1e-8):
    """`[steps + 1, 2]`."""
    x, m, v, path = np.array(start, float), np.zeros(2), np.zeros(2), [np.array(start, float)]
    for t in range(1, steps + 1):
        g = gradients_of(x)
        u = weights_of(name, g) @ g
        if adam:
            m, v = 0.9 * m + 0.1 * u, 0.999 * v + 0.001 * u**2
            u = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + eps)
        x = x - rate * u
        path.append(x)
    return np.array(path)


def points(count, seed=0):
    return np.random.default_rng(seed).uniform(-11, 11, (count, 2))


def test_the_losses_and_their_gradients(x64):
    x = np.concatenate([points(200), np.array(two_losses.STARTS), [[-5.0, 12.0], [-7.0, -8.0]]])
    both = jax.jit(jax.vmap(lambda x: (two_losses.losses(x), jax.jacrev(two_losses.losses)(x))))
    found, slopes = both(x)
    np.testing.assert_allclose(found, losses_of(*x.T), rtol=1e-12, atol=1e-12)
    # (-5, 12) is at the bottom of the ditch of L1, where the logarithm ends.
    np.testing.assert_allclose(found[-2, 0], 6 + np.log(5e-6), rtol=1e-4)
    expected = np.array([gradients_of(row) for row in x])
    smooth = np.abs(expected).max(axis=(1, 2)) < 100  # differences say nothing in the ditches
    smooth[-2] = False
    assert smooth.sum() > 180
    np.testing.assert_allclose(slopes[smooth], expected[smooth], rtol=1e-4, atol=1e-6)


def test_a_point_must_be_of_the_plane():
    with pytest.raises(ValueError, match=r"shape \(2,\), got \(3,\)"):
        two_losses.losses(np.zeros(3))


def test_the_front_is_where_weighted_sums_are_least():
    """By search on grids: one of all the plane, then a fine one around its best point."""
    front = two_losses.front(15)
    across = np.linspace(-11, 11, 441)
    wide = losses_of(*np.meshgrid(across, across, indexing="ij"))
    for w, point in zip(np.linspace(0, 1, 15), front, strict=True):
        i, j = np.unravel_index(np.argmin(wide @ [w, 1 - w]), wide.shape[:2])
        a, b = (np.linspace(across[k] - 0.2, across[k] + 0.2, 201) for k in (i, j))
        fine = losses_of(*np.meshgrid(a, b, indexing="ij")) @ [w, 1 - w]
        k, n = np.unravel_index(np.argmin(fine), fine.shape)
        np.testing.assert_allclose(point, [a[k], b[n]], atol=0.003)


def test_nothing_in_the_plane_is_better_than_the_front():
    across = np.linspace(-11, 11, 441)
    values = losses_of(*np.meshgrid(across, across)).reshape(-1, 2)
    on_front = losses_of(*two_losses.front(57).T)
    assert not (values[:, None] < on_front - 1e-9).all(axis=-1).any()
    # And all else is worse than some point of it, but for its spacing.
    behind = (on_front[None] - values[::7, None]).max(axis=-1).min(axis=1)
    assert behind.max() < 0.2


def test_the_distance_is_that_to_the_nearest_of_many_points():
    x = points(50, 1)
    brute = np.linalg.norm(x[:, None] - two_losses.front(20001), axis=-1).min(axis=1)
    np.testing.assert_allclose(two_losses.distance_to_front(x), brute, atol=1e-4)
    assert two_losses.distance_to_front(x.reshape(5, 10, 2)).shape == (5, 10)
    assert two_losses.distance_to_front(two_losses.front(33)).max() < 1e-5


def test_combiners_are_those_of_the_library_and_two_more():
    named = walks.combiners(0.25)
    assert tuple(named) == tuple(walks.NAMES)
    for name in set(COMBINERS) - {"cagrad"}:
        assert named[name] is COMBINERS[name]
    assert named["cagrad"].func is COMBINERS["cagrad"] and named["cagrad"].keywords == {"c": 0.25}
    g = np.float32([[1, 2], [-3, 0.5]])
    np.testing.assert_array_equal(named["mean"](g @ g.T) @ g, g.mean(axis=0))
    np.testing.assert_array_equal(walks.first_only(g @ g.T) @ g, g[0])


@pytest.mark.slow  # seconds of compiling
def test_a_walk_is_adam_after_the_combiner(x64):
    starts = np.array([[-8.5, 7.5], [9.0, -1.0]])
    adam = optax.adam(0.1, eps=1e-3)
    paths = walks.walk(walks.combiners(0.5)["mixed"], adam, starts, 12, 4)
    assert paths.shape == (2, 5, 2)
    for path, start in zip(paths, starts, strict=True):
        expected = descend("mixed", start, 12, rate=0.1, adam=True, eps=1e-3)
        np.testing.assert_allclose(path, expected[::3], atol=1e-5)
