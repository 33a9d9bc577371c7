"""Gradients by the input, each example's own: dtypes, what is refused, and who minds its batch."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blogjax.gradients.input_gradient import check_per_example, value_and_input_gradient
from blogjax.gradients.normalization import gradient_normalize


def test_values_are_float32_and_gradients_have_the_inputs_dtype():
    w, x = jnp.ones(3, jnp.bfloat16), jnp.ones((2, 3), jnp.bfloat16)
    value, gradient = jax.jit(lambda w, x: value_and_input_gradient(lambda w, x: x @ w, w, x))(w, x)
    assert (value.dtype, gradient.dtype) == (jnp.float32, jnp.bfloat16)
    np.testing.assert_array_equal(value, [3.0, 3.0])
    np.testing.assert_array_equal(gradient, x)


@pytest.mark.parametrize(
    ("critic", "message"),
    [
        (lambda w, x: x @ w, r"\(1, 1\).*\(1,\)"),
        (lambda w, x: (x @ w).mean(), r"shape \(\).*\(1, \.\.\.\)"),
        (lambda w, x: (x @ w).T, r"\(1, 1\).*\(1,\)"),
    ],
)
def test_outputs_that_are_not_one_scalar_per_example_are_refused(critic, message):
    with pytest.raises(ValueError, match=message):
        gradient_normalize(critic)(jnp.ones((3, 1)), jnp.ones((4, 3)))


def test_what_is_not_one_array_is_refused():
    x = jnp.ones((4, 3))

    def pair(w, x):
        return x @ w, x

    for call in (gradient_normalize(pair), lambda *a: check_per_example(pair, *a)):
        with pytest.raises(
            TypeError, match=r"the output must be one array, .* got <class 'tuple'>"
        ):
            call(jnp.ones(3), x)
    with pytest.raises(TypeError, match=r"x must be one array, .* got <class 'list'>"):
        gradient_normalize(pair)(jnp.ones(3), [x])


def test_bad_inputs_are_refused():
    critic = gradient_normalize(lambda w, x, *args: x @ w)
    with pytest.raises(TypeError, match="x is uint8"):
        critic(jnp.ones(3), jnp.ones((4, 3), jnp.uint8))
    with pytest.raises(TypeError, match="output is int32"):
        gradient_normalize(lambda w, x: jnp.zeros(len(x), jnp.int32))(None, jnp.ones((4, 3)))
    with pytest.raises(ValueError, match=r"args\[0/y\] has shape \(3,\).*\(4, 3\) needs 4 rows"):
        critic(jnp.ones(3), jnp.ones((4, 3)), {"y": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"x has shape \(\)"):
        critic(jnp.ones(3), jnp.ones(()))


class Normed(nn.Module):
    """A critic with one normalisation layer."""

    norm: type

    @nn.compact
    def __call__(self, x):
        options = {"use_running_average": False} if self.norm is nn.BatchNorm else {}
        x = nn.relu(self.norm(**options)(nn.Dense(8)(x)))
        return nn.Dense(1)(x)[:, 0]


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.BatchNorm])
def test_batch_norm_is_found_and_layer_norm_is_not(norm):
    module = Normed(norm)
    x = jax.random.normal(jax.random.key(0), (6, 4))
    params = jax.jit(module.init)(jax.random.key(1), x)

    def critic(params, x):
        return module.apply(params, x, mutable=["batch_stats"])[0]

    if norm is nn.LayerNorm:
        check_per_example(critic, params, x)
    else:
        with pytest.raises(ValueError, match=r"couples examples: row \d is .* batch of 6"):
            check_per_example(critic, params, x)


def test_what_check_per_example_says():
    x = jnp.eye(3, dtype=jnp.float32)

    def same(w, x):
        return x @ w

    check_per_example(same, jnp.ones(3), x)

    def first(w, x):
        return jnp.concatenate([x[:1] @ w, x[1:] @ w + 0.1 * (x[:1] @ w)])

    with pytest.raises(ValueError, match=r"row 1 is 1\.1 in its batch of 3 but 1 alone"):
        check_per_example(first, jnp.ones(3), x)
    check_per_example(first, jnp.ones(3), x, tolerance=0.2)
    with pytest.raises(ValueError, match=r"\(1, 3\).*at least 2"):
        check_per_example(same, jnp.ones(3), x[:1])
    with pytest.raises(ValueError, match=r"shape \(3, 1\).*\(3,\)"):
        check_per_example(same, jnp.ones((3, 1)), x)
    for spoilt in (jnp.nan, jnp.inf):
        expected = f"cannot be compared: row 1 is {spoilt} in its batch of 3 and {spoilt} alone"
        with pytest.raises(ValueError, match=expected):
            check_per_example(lambda w, x: jnp.where(x[:, 1] > 0, w, x[:, 0]), spoilt, x)
        # Statistics of one row are often 0/0: that is coupling.
        with pytest.raises(ValueError, match=f"couples .* row 0 is 1 in .* but {spoilt} alone"):
            check_per_example(lambda w, x: x[:, 0] if len(x) > 1 else w + x[:, 0], spoilt, x)


def test_no_example_sees_another():
    """What the sum over the batch would mix: here D(x_i) depends on the batch's mean."""

    def coupled(w, x):
        return jnp.tanh((x - 0.5 * x.mean(0, keepdims=True)) @ w)

    def alone(w, x):
        return jnp.tanh(0.5 * x @ w)

    x = jnp.array([[1.0, 2.0], [-3.0, 0.5]])
    together, apart = (jax.jit(gradient_normalize(f))(jnp.ones(2), x) for f in (coupled, alone))
    np.testing.assert_allclose(together, apart, rtol=1e-6)
