import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gradient_ops
from benchmarks.compiled_step import CompiledStep, operations

BATCH, INNER, OUTER, TAPS = 2, 3, 5, 4


def hlo(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().as_text()


def test_products_in_a_loop_count_as_often_as_it_runs():
    def power(w, x, u, v):
        h = jax.lax.fori_loop(0, 7, lambda _, h: jnp.tanh(h @ w), x)
        return h @ u @ v

    shapes = (24, 24), (16, 24), (24, 40), (40,)
    found = operations(hlo(power, *(jnp.ones(shape) for shape in shapes)))
    assert found.products == 8
    assert found.multiplications == 7 * 16 * 24 * 24 + 16 * 24 * 40 + 16 * 40


def convolve(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (2, 2), ((1, 2), (0, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def pairs(size, low, high):
    """Outputs and taps along one axis that meet an input, one by one."""
    there = np.pad(np.ones(size, int), (low, high))
    return sum(there[i : i + TAPS].sum() for i in range(0, len(there) - TAPS + 1, 2))


# Each product of an input and a tap in the convolution is one in either derivative. What is smaller
# than its kernel is the kernel of XLA's program.
@pytest.mark.parametrize("size", [6, 14])
@pytest.mark.parametrize("derivative", [None, 0, 1])
def test_a_convolution_and_its_derivatives_multiply_equally_often(derivative, size):
    x = jnp.ones((BATCH, size, size, INNER))
    kernel = jnp.ones((TAPS, TAPS, INNER, OUTER))
    function = convolve
    if derivative is not None:
        function = jax.grad(lambda *a: jnp.sum(convolve(*a) ** 2 / 2), derivative)
    found = operations(hlo(function, x, kernel))
    times = 1 if derivative is None else 2  # the convolution itself comes first
    each = pairs(size, 1, 2) * pairs(size, 0, 1) * BATCH * INNER * OUTER
    assert found == (times, times * each)


def test_a_step_is_compiled_with_what_it_multiplies():
    step = CompiledStep(lambda w, x: {"product": x @ w}, np.ones((8, 4)), np.ones((3, 8)))
    assert (step.facts["products"], step.facts["multiplications"]) == (1, 96)
    np.testing.assert_array_equal(step.outcome()[0], np.full((3, 4), 8.0))
    clock, work = step.seconds(2)
    assert clock > 0 and work >= 0


class Given:
    """A contender that gives what it was told to."""

    def __init__(self, *outcome, multiplications=None):
        self._outcome = [np.array(a, np.float32) for a in outcome]
        self.facts = {} if multiplications is None else {"multiplications": multiplications}

    def outcome(self):
        return self._outcome


def test_ratios_are_taken_repeat_for_repeat_and_peers_beside_their_own_plain_step():
    contenders = {
        "plain": Given(multiplications=10),
        "gn": Given(multiplications=22),
        "PyTorch, plain": Given(),
        "PyTorch, gn": Given(),
    }
    seconds = {
        "plain": [(1.0, 2.0), (2.0, 2.0), (4.0, 2.0)],
        "gn": [(3.0, 5.0), (4.0, 6.0), (4.0, 7.0)],
        "PyTorch, plain": [(2.0, 2.0), (2.0, 3.0), (2.0, 6.0)],
        "PyTorch, gn": [(8.0, 6.0), (12.0, 6.0), (14.0, 6.0)],
    }
    ours = gradient_ops.row("gn", contenders, seconds)
    assert ours["ms"] == [4000.0, 3500.0, 4000.0]
    assert ours["ratio"] == [2.0, 1.5, 2.5]
    assert ours["work"] == [3.0, 2.75, 3.25]
    assert ours["operations"] == 2.2 and "times ours" not in ours
    theirs = gradient_ops.row("PyTorch, gn", contenders, seconds)
    assert theirs["ratio"] == [6.0, 5.0, 6.5] and theirs["work"][0] == 2.0
    assert theirs["times ours"] == [3.0, 2.833, 3.25]
    assert "operations" not in theirs


@pytest.mark.parametrize(
    ("theirs", "same"), [([1.0, 2.0], True), ([1.0, 2.1], False), ([[1.0, 2.0]], False)]
)
def test_what_is_not_the_same_function_is_not_measured(theirs, same):
    ours = Given([1.0, 2.0])
    groups = {
        gradient_ops.CLASSIFIER: {gradient_ops.SAM: ours, gradient_ops.OPTAX_SAM: ours},
        gradient_ops.NORMS: {gradient_ops.GHOST: ours, gradient_ops.VMAP: ours},
        gradient_ops.CRITIC: {"gn": ours, "PyTorch, gn": Given(theirs)},
        gradient_ops.GENERATOR: {},
    }
    if same:
        assert set(gradient_ops.check(groups).values()) == {0.0}
    else:
        with pytest.raises(SystemExit, match="'PyTorch, gn' is not our gn"):
            gradient_ops.check(groups)
