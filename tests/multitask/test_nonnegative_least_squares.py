import jax
import jax.numpy as jnp
import numpy as np
import pytest
from task_matrices import FAMILIES, enumerated, family, gram64, in_batches_of, many

from blogjax.multitask.nonnegative_least_squares import nonnegative_least_squares

LIMITED = in_batches_of(
    72, jax.jit(jax.vmap(lambda k, c, n: nonnegative_least_squares(k, c, max_iterations=n)))
)


def SOLVE(matrix, linear):
    return LIMITED(matrix, linear, np.full(len(matrix), 10 * matrix.shape[1] + 10, np.int32))


def normal_linear(gradients, rng):
    """`c = G v`: the objective is bounded from below, as for any least squares."""
    v = rng.normal(size=(len(gradients), gradients.shape[2]))
    return np.einsum("nkd,nd->nk", np.asarray(gradients, float), v)


def value(matrix, linear, x):
    return np.einsum("nk,nk->n", x, np.einsum("nkj,nj->nk", matrix, x) / 2 + linear)


def check_against_enumeration(dtype, tolerance):
    rng = np.random.default_rng(0)
    gradients = np.stack([family(name, 6, rng) for name in FAMILIES for _ in range(12)])
    matrix, linear = gram64(gradients), normal_linear(gradients, rng)
    found = SOLVE(matrix.astype(dtype), linear.astype(dtype))
    assert found.converged.all()
    assert found.x.dtype == dtype
    x = np.asarray(found.x, np.float64)
    assert (x >= 0).all()
    for i in range(len(x)):
        _, least = enumerated(matrix[i], linear[i])
        # What rounding the matrix and the vector alone may cost.
        scale = np.sqrt(np.diagonal(matrix[i]))
        size = abs(least) + np.square(np.abs(linear[i]) / scale).max()
        assert value(matrix[i : i + 1], linear[i : i + 1], x[i : i + 1])[0] - least < (
            tolerance * size
        ), i


@pytest.mark.slow  # seconds of compiling
def test_every_set_of_free_coefficients_tried():
    check_against_enumeration(np.float32, 2e-6)


@pytest.mark.slow
def test_every_set_of_free_coefficients_tried_in_float64(x64):
    check_against_enumeration(np.float64, 1e-11)


@pytest.mark.parametrize("n", [6, pytest.param(32, marks=pytest.mark.slow)])
def test_the_conditions_of_an_optimum(n):
    """Nothing left that would lower the objective, nothing used that has a slope."""
    rng = np.random.default_rng(n)
    gradients = many(n, 12, seed=n)
    gradients /= np.linalg.norm(gradients, axis=2, keepdims=True)
    matrix, linear = gram64(gradients), normal_linear(gradients, rng)
    found = SOLVE(matrix.astype(np.float32), linear.astype(np.float32))
    assert found.converged.all()
    x = np.asarray(found.x, np.float64)
    slope = -(np.einsum("nkj,nj->nk", matrix, x) + linear)
    size = 1e-6 * n * (np.abs(linear).max(1) + x.sum(1))
    assert (slope.max(1) < size).all()
    assert (np.where(x > 0, np.abs(slope), 0).max(1) < size).all()
    assert found.iterations.max() <= n + 4


def test_one_coefficient_has_its_closed_form():
    """`max(-c, 0) / K`, in any unit."""
    matrix, linear = np.zeros((4, 6, 6), np.float32), np.zeros((4, 6), np.float32)
    matrix[:, 2, 2] = [4.0, 4.0, 1e-30, 1e30]
    linear[:, 2] = [-2.0, 2.0, -1e-20, -1e20]
    found = SOLVE(matrix, linear)
    np.testing.assert_allclose(found.x[:, 2], [0.5, 0.0, 1e10, 1e-10], rtol=2e-7)
    assert (found.x[1] == 0).all()


def test_units_of_the_coefficients_do_not_matter():
    """Powers of two on the gradients: the same bits, divided."""
    gradients = many(6, 4, seed=3)
    rng = np.random.default_rng(1)
    linear = normal_linear(gradients, rng).astype(np.float32)
    unit = 2.0 ** rng.integers(-12, 13, size=linear.shape).astype(np.float32)
    matrix = gram64(gradients).astype(np.float32)
    plain = SOLVE(matrix, linear).x
    other = SOLVE(matrix * unit[:, :, None] * unit[:, None, :], linear * unit).x
    np.testing.assert_array_equal(other, plain / unit)


def test_what_has_no_curvature_stays_zero():
    matrix = np.zeros((1, 6, 6), np.float32)
    matrix[0, 0, 0] = 2.0
    found = SOLVE(matrix, np.full((1, 6), -1.0, np.float32))
    np.testing.assert_allclose(found.x[0], [0.5, 0, 0, 0, 0, 0], rtol=1e-6)
    assert found.converged.all()


def test_no_coefficient():
    found = nonnegative_least_squares(jnp.zeros((0, 0)), jnp.zeros(0))
    assert found.x.shape == (0,)
    assert bool(found.converged)


def test_equal_columns_share():
    g = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    matrix = np.zeros((1, 6, 6), np.float32)
    matrix[0, :3, :3] = g @ g.T
    linear = np.array([[-1.0, -1.0, 1.0, 0.0, 0.0, 0.0]], np.float32)
    x = np.asarray(SOLVE(matrix, linear).x[0])
    np.testing.assert_allclose(x[:3], [0.5, 0.5, 0.0], atol=1e-6)


def test_a_falling_direction_without_curvature_ends():
    """Opposite gradients, `c = -1`: no minimum; the answer is large, finite and not negative."""
    g = np.array([[1.0, 2.0], [-1.0, -2.0]] * 3)
    found = SOLVE(gram64(g)[None].astype(np.float32), np.full((1, 6), -1.0, np.float32))
    assert np.isfinite(found.x).all()
    assert (found.x >= 0).all()
    assert found.x.max() > 1e3


def test_infinity_and_nan_end():
    for bad in (np.nan, np.inf):
        matrix = np.eye(6, dtype=np.float32)
        matrix[1, 2] = matrix[2, 1] = bad
        found = SOLVE(matrix[None], np.full((1, 6), -1.0, np.float32))
        assert found.iterations[0] <= 70


def test_cut_short_it_is_still_feasible_and_never_worse_than_before():
    rng = np.random.default_rng(9)
    g = rng.normal(size=(72, 6, 4)).astype(np.float32)
    matrix, linear = gram64(g).astype(np.float32), rng.normal(size=(72, 6)).astype(np.float32)
    before = np.zeros(72)
    for limit in range(4):
        found = LIMITED(matrix, linear, np.full(72, limit, np.int32))
        assert (found.x >= 0).all() and not found.converged.all()
        x = np.asarray(found.x, float)
        now = value(matrix.astype(float), linear.astype(float), x)
        assert (now <= before + 1e-5 * np.abs(before)).all()
        before = now


def test_the_limit_is_told():
    g = np.random.default_rng(8).normal(size=(6, 6))
    matrix = np.stack([gram64(g)] * 4).astype(np.float32)
    linear = np.stack([-np.ones(6, np.float32)] * 4)
    found = LIMITED(matrix, linear, np.array([0, 1, 70, 700], np.int32))
    assert found.converged.tolist() == [False, False, True, True]
    assert found.iterations[:2].tolist() == [0, 1]
    assert found.iterations[2] > 1
    np.testing.assert_array_equal(found.x[2], found.x[3])


@pytest.mark.parametrize(
    ("gram", "linear", "message"),
    [
        (jnp.eye(3), jnp.ones(2), r"\(3, 3\).*\(2,\)"),
        (jnp.eye(3), jnp.ones((3, 1)), r"\(3, 3\).*\(3, 1\)"),
        (jnp.eye(3), jnp.ones(3, jnp.bfloat16), r"float32.*bfloat16"),
        (jnp.eye(3, dtype=jnp.int32), jnp.ones(3, jnp.int32), "int32"),
    ],
)
def test_bad_input(gram, linear, message):
    with pytest.raises(ValueError, match=message):
        nonnegative_least_squares(gram, linear)
