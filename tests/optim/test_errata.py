"""Errata of optax 0.2.8: what it does, and what is done here, side by side.

Where the half about optax fails, optax has mended it: then take the difference out of the header of
the method, and the test with it. What every optimiser here promises is in `tests/conformance`.
"""

import contextlib
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from blogjax.optim.accumulate import accumulate
from blogjax.optim.hidden_accumulation import accumulating_adam
from blogjax.optim.lion import lion
from blogjax.optim.normalize import normalize_gradients
from blogjax.optim.skip_nonfinite import skip_nonfinite
from blogjax.optim.sparse_rows import lazy_rows
from blogjax.optim.stochastic_rounding import stochastic_rounding
from blogjax.optim.tiger import tiger

BF16 = jnp.bfloat16


def step_of(tx):
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def walk(tx, params, gradients):
    """The parameters after every step, and the last state."""
    state, path = tx.init(params), []
    step = jax.jit(step_of(tx))
    for grads in gradients:
        params, state = step(params, state, grads)
        path.append(params)
    return path, state


def scan(tx, params, gradients):
    """The same in one `lax.scan`, which insists that a step returns the types it was given."""
    body = lambda carry, grads: (step_of(tx)(*carry, grads), None)  # noqa: E731
    return jax.jit(lambda g: jax.lax.scan(body, (params, tx.init(params)), g)[0])(gradients)


@pytest.mark.parametrize("fault", [np.nan, np.inf])
def test_multisteps_nan(fault):
    """optax#828: multiplied by 0 where it should be replaced, it is there at once and for ever."""
    sequence = [jnp.array([g]) for g in (fault, 1.0, 1.0, 1.0)]
    plain = optax.MultiSteps(optax.sgd(1.0), 2).gradient_transformation()
    optimisers = {
        "optax": plain,
        "left out of its window": accumulate(optax.sgd(1.0), 2),
        "as if it had never been": skip_nonfinite(plain),
    }
    after = {
        name: [float(p[0]) for p in walk(tx, jnp.zeros(1), sequence)[0]]
        for name, tx in optimisers.items()
    }
    assert np.isnan(after["optax"]).all()
    assert after["left out of its window"] == [0, -1, -1, -2]
    assert after["as if it had never been"] == [0, 0, -1, -1]


KEEP = {
    "lion": (lion(0.1), BF16),
    # The second moment is wide by design.
    "adam, 2 microbatches": (accumulating_adam(0.1, accumulate_steps=2), BF16, jnp.float32),
    "accumulate": (accumulate(optax.adam(0.1), 2), BF16),
    "stochastic rounding of adam": (
        stochastic_rounding(optax.adam(0.1), jax.random.key(0)), jnp.float32,
    ),
    "stochastic rounding of lion": (
        stochastic_rounding(optax.lion(0.1, mu_dtype=BF16), jax.random.key(0)), BF16,
    ),
    "stochastic rounding, injected": (
        stochastic_rounding(optax.inject_hyperparams(optax.adamw)(0.1), jax.random.key(0)),
        jnp.float32,
    ),
}  # fmt: skip


@pytest.mark.parametrize("tx", [optax.lion(0.1), optax.adam(0.1)], ids=["lion", "adam"])
def test_bf16_momentum_drifts_to_float32_under_scan(tx):
    """float32 gradients of bfloat16 parameters turn the moments into float32 in the first step."""
    with pytest.raises(TypeError, match=r"carry.*mu has type bfloat16\[4\]"):
        scan(tx, jnp.ones(4, BF16), jnp.ones((4, 4)))


@pytest.mark.parametrize("name", KEEP)
def test_bf16_momentum_stays_under_scan(name):
    tx, *dtypes = KEEP[name]
    params = jnp.ones(4, BF16)
    after, state = scan(tx, params, jnp.ones((4, 4)))
    assert after.dtype == BF16 and np.all(after < 1)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(params))
    state = state.inner if name == "accumulate" else state
    moments = {x.dtype for x in jax.tree.leaves(state) if x.shape == (4,)}
    assert moments == set(map(jnp.dtype, dtypes))


def test_frozen_bf16_weights():
    """Lion at lr 1e-4 on N(0, .02^2): half a step of bfloat16 is more than lr from 2^-5 on.

    Closed form: the fraction of weights above 2^-5 is erfc(2^-5 / .02 / sqrt 2) = 11.8%. They never
    move; with stochastic rounding all do, by 100 lr on average.
    """
    n, lr, steps = 20_000, 1e-4, 100
    start = jnp.asarray(0.02 * np.random.default_rng(0).normal(size=n), BF16)
    direction = jnp.asarray(np.random.default_rng(1).choice([-1.0, 1.0], n), BF16)
    plain = optax.lion(lr, weight_decay=0.0)
    gradients = jnp.broadcast_to(direction, (steps, n))
    nearest, _ = scan(plain, start, gradients)
    ours, state = scan(stochastic_rounding(plain, jax.random.key(0)), start, gradients)
    assert ours.dtype == BF16 and int(state.step) == steps

    def moved(after):
        return np.asarray(start, np.float64) - np.asarray(after, np.float64)

    frozen = moved(nearest) == 0
    assert frozen[np.abs(np.asarray(start, np.float64)) > 2.0**-5].all()
    expected = math.erfc(2.0**-5 / 0.02 / math.sqrt(2))
    assert abs(expected - 0.118) < 5e-4
    assert abs(frozen.mean() - expected) < 4 * math.sqrt(expected * (1 - expected) / n)
    assert (moved(ours) == 0).mean() == 0
    walked = moved(ours) * np.asarray(direction, np.float64)
    # A step of one unit d has standard deviation below d / 2, and d <= 2^-11 here.
    assert abs(walked.mean() - steps * lr) < 4 * 2.0**-12 * math.sqrt(steps / n)
    rest = moved(nearest) * np.asarray(direction, np.float64)
    assert rest[rest != 0].mean() > 1.03 * steps * lr


@pytest.mark.parametrize(
    ("param", "grad", "wrong"), [((3,), (1, 3), (1, 3)), ((2, 3), (1, 3), (2, 3))]
)
def test_shapes_that_broadcast(param, grad, wrong):
    """A gradient of another shape is spread over the parameter, or changes the parameter's."""
    params, grads = {"dense": {"w": jnp.zeros(param)}}, {"dense": {"w": jnp.ones(grad)}}

    def after(tx):
        return jax.eval_shape(step_of(tx), params, jax.eval_shape(tx.init, params), grads)[0]

    with jax.numpy_rank_promotion("allow"):  # which is jax's own default
        for tx in (optax.lion(0.1), optax.adamw(0.1)):
            assert after(tx)["dense"]["w"].shape == wrong
        for tx in (lion(0.1), tiger(0.1), accumulate(optax.sgd(0.1), 2),
                   lazy_rows(optax.lion(0.1), False)):  # fmt: skip
            with pytest.raises(ValueError, match=r"gradient dense/w has shape \(1, 3\)"):
                after(tx)


def test_rates_outside_their_range():
    """b1 = 1.5 turns Lion against the gradient, b2 = -3 makes its momentum explode."""
    wrong = optax.lion(1.0, b1=1.5, b2=-3.0, weight_decay=0.0)
    path, state = walk(wrong, jnp.zeros(1), jnp.ones((4, 1)))
    assert [float(p[0]) for p in path] == [1, 0, 1, 0]
    assert state[0].mu.tolist() == [-80]  # 4, -8, 28, -80: times -3, plus 4
    for rate in ({"b1": 1.5}, {"b2": -3.0}, {"b1": 1.0}):
        with pytest.raises(ValueError, match=r"but must lie in \[0, 1\)"):
            lion(1.0, **rate)


def test_integer_leaves():
    """Their momentum is of another type after a step, and what is not whole is lost."""
    params, grads = {"steps": jnp.array([1, 2])}, {"steps": jnp.ones(2)}
    (after,), state = walk(optax.lion(0.1), params, [grads])
    before = optax.lion(0.1).init(params)[0].mu["steps"].dtype
    assert (before, state[0].mu["steps"].dtype) == (jnp.int32, jnp.float32)
    assert after["steps"].tolist() == [0, 1]
    for tx in (lion(0.1), tiger(0.1), accumulate(optax.sgd(0.1), 2)):
        with pytest.raises(TypeError, match="parameter steps is int32, but must be real"):
            tx.init(params)


def test_injected_rates_have_the_dtype_of_the_first_parameter():
    """In bfloat16 b2 = .999 is 1, so Adam is NaN. In float32 they turn optax's momentum float32."""
    params, gradients = jnp.ones(2, BF16), jnp.ones((3, 2), BF16)
    (after, *_), state = walk(optax.inject_hyperparams(optax.adamw)(1e-3), params, gradients)
    assert state.hyperparams["b2"] == 1
    assert np.isnan(after).all()

    def inject(make):
        return optax.inject_hyperparams(make, hyperparam_dtype=jnp.float32)

    with pytest.raises(TypeError, match=r"carry.*mu has type bfloat16\[2\]"):
        scan(inject(optax.lion)(0.1), params, gradients)
    for make in (lion, tiger):
        tx = inject(make)(0.1)
        after, state = scan(tx, params, gradients)
        chex.assert_trees_all_equal_dtypes(state, tx.init(params))
        assert after.dtype == BF16 and np.all(after < 1)


@pytest.mark.parametrize("make", [optax.lion, lion])
def test_what_is_not_under_the_mask_gets_its_raw_gradient(make):
    """optax#159, so documented: it climbs. Three cures, around any transformation."""
    params, grads = {"w": jnp.ones(1), "b": jnp.ones(1)}, {"w": jnp.ones(1), "b": jnp.full(1, 7.0)}
    tx, frozen = make(0.5, weight_decay=0.0), {"w": False, "b": True}
    masked = optax.masked(tx, {"w": True, "b": False})
    parts = {False: tx, True: optax.set_to_zero()}
    cures = [
        optax.partition(parts, frozen),
        optax.selective_transform(tx, freeze_mask=frozen),
        optax.chain(masked, optax.freeze(frozen)),
    ]
    for wrapped, b in [(masked, 8.0), *((cure, 1.0) for cure in cures)]:
        (after,), _ = walk(wrapped, params, [grads])
        assert {name: p.tolist() for name, p in after.items()} == {"w": [0.5], "b": [b]}


def test_zero_matrices_never_train_under_rates_relative_to_them():
    """Neither by the post's rule, here with optax's parts, nor by ours; which says so first."""
    params, gradients = {"head": jnp.zeros((2, 3))}, [{"head": jnp.ones((2, 3))}] * 3
    post = optax.chain(optax.scale_by_param_block_rms(0.0), optax.scale(-0.1))
    told = pytest.warns(UserWarning, match="head is all zeros and will never train: give a floor")
    for tx, warned in ((post, contextlib.nullcontext()), (tiger(0.1), told)):
        with warned:
            assert np.all(walk(tx, params, gradients)[0][-1]["head"] == 0)
    (after, *_), _ = walk(tiger(0.1, floor=0.01), params, gradients)
    np.testing.assert_allclose(after["head"], -1e-3, rtol=1e-6)


def test_normalize_by_update_norm():
    """NaN at zero without eps; with it small gradients stay small, and large ones vanish."""

    def apply(tx, grads):
        return tx.update(grads, tx.init(grads))[0]

    assert np.isnan(apply(optax.normalize_by_update_norm(eps=0.0), jnp.zeros(2))).all()
    theirs, ours = optax.normalize_by_update_norm(), normalize_gradients()
    for value, wrong in ((6e-7, 0.5), (6e-30, 1e-23), (6e20, 0.0)):
        g = jnp.array([0.6, 0.8]) * (value / 0.6)
        np.testing.assert_allclose(apply(theirs, g), np.array([0.6, 0.8]) * wrong, rtol=1e-5)
        np.testing.assert_allclose(apply(ours, g), [0.6, 0.8], rtol=1e-6)
    assert apply(ours, jnp.zeros(2)).tolist() == [0, 0]
