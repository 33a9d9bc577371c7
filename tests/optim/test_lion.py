"""Lion against numpy in float64, optax, and the properties that a wrong version breaks."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blogjax.optim.lion import from_adamw, lion, lion_hparams, scale_by_lion

EPS = float(np.finfo(np.float32).eps)


def train(tx, params, gradients, jit=True):
    """All parameters on the way, the last state, and how often the step was compiled."""
    state = tx.init(params)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step) if jit else step
    path = []
    for grads in gradients:
        params, state = step(params, state, grads)
        path.append(params)
    return path, state


def reference(theta, gradients, lr, b1, b2, wd):
    """Float64, in the order of the paper."""
    theta, m = np.asarray(theta, np.float64), np.zeros(np.shape(theta))
    path = []
    for t, g in enumerate(np.asarray(gradients, np.float64)):
        rate = lr(t) if callable(lr) else lr
        theta = theta - rate * (np.sign(b1 * m + (1 - b1) * g) + wd * theta)
        m = b2 * m + (1 - b2) * g
        path.append(theta)
    return path, m


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_two_steps_by_hand():
    """f = (x^2 + 4 y^2) / 2 from (1, 1)."""
    tx = lion(0.1, 0.9, 0.9, weight_decay=0.01)
    params = jnp.ones(2)
    state = tx.init(params)
    seen = []
    for _ in range(2):
        updates, state = tx.update(jnp.array([1.0, 4.0]) * params, state, params)
        params = optax.apply_updates(params, updates)
        seen.append((params, state[0].mu))
    np.testing.assert_allclose(seen[0][0], [0.899, 0.899], rtol=1e-6)
    np.testing.assert_allclose(seen[0][1], [0.1, 0.4], rtol=1e-6)
    np.testing.assert_allclose(seen[1][0], [0.798101, 0.798101], rtol=1e-6)


@pytest.mark.parametrize("betas", [
    (0.9, 0.99), (0.95, 0.98), (0.9, 0.9), (0.99, 0.9), (0.9, 0.01), (0.9, 0.0), (0.0, 0.99),
    (0.0, 0.0), (0.999, 0.9999),
])  # fmt: skip
def test_many_steps_in_float64(betas, x64):
    """The table burn#5740 asks for, every special case of the rates included."""
    gradients = normal(0, 30, 50).astype(np.float64)
    schedule = lambda t: 0.01 / (t + 1)  # noqa: E731
    theta = jnp.asarray(normal(1, 50), jnp.float64)
    path, state = train(lion(schedule, *betas, weight_decay=0.1), theta, jnp.asarray(gradients))
    expected, m = reference(theta, gradients, schedule, *betas, 0.1)
    np.testing.assert_allclose(np.stack(path), np.stack(expected), rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(state[0].mu, m, rtol=1e-12, atol=1e-15)
    assert state[0].count == 30


def test_100_steps_beside_optax():
    """The same momentum, and the same signs wherever c is not rounding error."""
    ours, theirs = scale_by_lion(), optax.scale_by_lion()
    params = {"a": jnp.zeros((40, 50)), "b": [jnp.zeros(7)]}
    state = other = ours.init(params)
    update, update_other = jax.jit(ours.update), jax.jit(theirs.update)
    for i in range(100):
        grads = {"a": jnp.asarray(normal(i, 40, 50)), "b": [jnp.asarray(normal(-i % 97, 7))]}
        before = other.mu
        u, state = update(grads, state)
        v, other = update_other(grads, other)
        chex.assert_trees_all_close(state.mu, other.mu, rtol=1e-5, atol=1e-7)
        for u_leaf, v_leaf, g, m in zip(*map(jax.tree.leaves, (u, v, grads, before)), strict=True):
            g, m = np.asarray(g, np.float64), np.asarray(m, np.float64)
            clear = np.abs(0.9 * m + 0.1 * g) > 4 * EPS * np.maximum(np.abs(g), np.abs(m))
            assert clear.mean() > 0.99
            np.testing.assert_array_equal(np.asarray(u_leaf)[clear], np.asarray(v_leaf)[clear])
    assert state.count == other.count == 100


numbers = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)


@given(
    st.tuples(st.floats(0, 0.9999), st.floats(0, 0.9999)),
    st.lists(st.tuples(numbers, numbers), min_size=8, max_size=8),
)
def test_the_sign_is_exact_where_c_is_clear_for_all_rates(betas, pairs):
    b1, b2 = betas
    g, m = np.array(pairs, np.float32).T
    state = optax.ScaleByLionState(jnp.zeros((), jnp.int32), jnp.asarray(m))
    u, _ = scale_by_lion(b1, b2).update(jnp.asarray(g), state)
    c = b1 * m.astype(np.float64) + (1 - b1) * g.astype(np.float64)
    clear = np.abs(c) > 4 * EPS * np.maximum(np.abs(g), np.abs(m))
    np.testing.assert_array_equal(np.asarray(u)[clear], np.sign(c)[clear])


def test_few_signs_are_wrong_where_c_nearly_cancels():
    """`g + r (m' - g)` has ten times as many: 12% here, against 1 to 2%."""
    g = normal(0, 400_000)
    m = (-g / 9 * (1 + 1e-6 * normal(1, 400_000))).astype(np.float32)
    state = optax.ScaleByLionState(jnp.zeros((), jnp.int32), jnp.asarray(m))
    u, _ = jax.jit(scale_by_lion().update)(jnp.asarray(g), state)
    v, _ = jax.jit(optax.scale_by_lion().update)(jnp.asarray(g), state)
    exact = np.sign(0.9 * m.astype(np.float64) + 0.1 * g.astype(np.float64))
    wrong, theirs = np.mean(np.asarray(u) != exact), np.mean(np.asarray(v) != exact)
    assert wrong < 0.025
    assert wrong < 1.5 * theirs


@pytest.mark.parametrize(
    "betas",
    [(0.9, 0.99), (0.9, 0.9), (0.99, 0.9), (0.5, 0.0)]
    + [tuple(map(np.float32, betas)) for betas in [(0.9, 0.99), (0.9, 0.9), (0.99, 0.9)]],
)
def test_infinities_have_their_sign(betas):
    if isinstance(betas[0], np.float32):
        betas = tuple(map(jnp.asarray, betas))  # of which nothing is known
    inf = jnp.inf
    g = jnp.array([inf, -inf, 1.0, 1.0, inf, -inf, inf, 0.0])
    m = jnp.array([1.0, 1.0, inf, -inf, inf, -inf, -0.5, inf])
    state = optax.ScaleByLionState(jnp.zeros((), jnp.int32), m)
    u, state = scale_by_lion(*betas).update(g, state)
    assert u.tolist() == [1, -1, 1, -1, 1, -1, 1, 1]
    if betas[1] != 0:
        assert state.mu.tolist() == [inf, -inf, inf, -inf, inf, -inf, inf, inf]


def test_nan_stays_in_its_entry_and_is_not_hidden():
    tx = scale_by_lion()
    u, state = tx.update(jnp.array([jnp.nan, 1.0]), tx.init(jnp.zeros(2)))
    np.testing.assert_array_equal(u, [np.nan, 1])
    np.testing.assert_allclose(state.mu, [np.nan, 0.01], rtol=1e-6)


def test_traced_rates_give_what_numbers_give():
    params, grads = jnp.asarray(normal(0, 100)), jnp.asarray(normal(1, 20, 100))
    injected = optax.inject_hyperparams(lion)(0.01, weight_decay=0.1)
    a, state = train(injected, params, grads)
    b, _ = train(lion(0.01, weight_decay=0.1), params, grads)
    np.testing.assert_allclose(np.stack(a), np.stack(b), rtol=1e-6)
    assert {"b1", "b2"} <= state.hyperparams.keys()


def test_a_traced_b2_of_zero_is_nan_not_silently_wrong():
    u, _ = scale_by_lion(0.9, jnp.float32(0)).update(
        jnp.ones(2), scale_by_lion().init(jnp.zeros(2))
    )
    assert np.isnan(u).all()


def test_traced_rates_do_not_change_dtypes():
    tx = optax.inject_hyperparams(scale_by_lion)()
    params = jnp.ones(3, jnp.bfloat16)
    u, state = tx.update(params, tx.init(params))
    assert u.dtype == state.inner_state.mu.dtype == jnp.bfloat16


@given(st.integers(-20, 20))
def test_the_scale_of_the_gradients_does_not_matter(power):
    grads = jnp.asarray(normal(0, 10, 40))
    a, _ = train(lion(0.01), jnp.ones(40), grads)
    b, _ = train(lion(0.01), jnp.ones(40), grads * 2.0**power)
    np.testing.assert_array_equal(np.stack(a), np.stack(b))


def test_permutation_and_sign_flips_commute_with_it():
    params, grads = normal(0, 40), normal(1, 10, 40)
    order = np.random.default_rng(2).permutation(40)
    flip = np.where(np.arange(40) % 3 == 0, -1, 1).astype(np.float32)
    a, _ = train(lion(0.01), jnp.asarray(params), jnp.asarray(grads))
    b, _ = train(
        lion(0.01), jnp.asarray((flip * params)[order]), jnp.asarray((flip * grads)[:, order])
    )
    np.testing.assert_array_equal((flip * np.stack(a))[:, order], np.stack(b))


def test_every_step_is_lr_or_nothing():
    """|theta_t - theta_{t-1} (1 - lr wd)| in {0, lr}, with numbers that are exact in binary."""
    lr, wd = 2.0**-6, 2.0**-2
    theta = np.round(normal(0, 60) * 2**8) / 2**8
    grads = normal(1, 60)
    grads[::3] = 0
    path, _ = train(lion(lr, weight_decay=wd), jnp.asarray(theta), jnp.asarray(grads[None]))
    moved = np.abs(np.asarray(path[0], np.float64) - theta.astype(np.float64) * (1 - lr * wd))
    np.testing.assert_array_equal(moved, np.where(grads == 0, 0, lr))


@given(st.floats(0, 100), st.integers(0, 5))
def test_the_sign_knows_neither_decay_nor_parameters(wd, seed):
    """Coupled decay (bitsandbytes#1992) would bring both into the momentum."""
    grads = jnp.asarray(normal(seed, 4, 20))
    states = []
    for decay, params in [(0.0, jnp.zeros(20)), (wd, jnp.asarray(normal(seed + 1, 20) * 100))]:
        tx = lion(0.01, weight_decay=decay)
        state = tx.init(params)
        for g in grads:
            updates, state = tx.update(g, state, params)
        states.append((np.asarray(updates) + 0.01 * decay * np.asarray(params), state[0].mu))
    np.testing.assert_array_equal(states[0][1], states[1][1])
    np.testing.assert_allclose(states[0][0], states[1][0], atol=1e-5 * (1 + wd))


def test_decay_is_decoupled_and_multiplied_by_the_rate():
    schedule = optax.linear_schedule(0.1, 0.0, 10)
    path, _ = train(lion(schedule, weight_decay=0.5), jnp.ones(1), jnp.zeros((10, 1)))
    expected = np.cumprod([1 - 0.1 * (1 - t / 10) * 0.5 for t in range(10)])
    np.testing.assert_allclose(np.concatenate(path), expected, rtol=1e-6)


def test_the_decay_may_be_scheduled_and_masked():
    schedule = optax.piecewise_constant_schedule(0.5, {1: 0.5})
    params = {"w": jnp.ones(1), "b": jnp.ones(1)}
    zero = jax.tree.map(jnp.zeros_like, params)
    path, _ = train(
        lion(0.5, weight_decay=schedule, mask={"w": True, "b": False}), params, [zero] * 2
    )
    assert path[1]["b"] == 1.0
    np.testing.assert_allclose(path[1]["w"], [0.75 * 0.875], rtol=1e-6)


def test_a_constant_sign_leads_to_minus_one_over_the_decay():
    tx = lion(0.05, weight_decay=0.5)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jnp.ones(()), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (jnp.zeros(()), tx.init(jnp.zeros(()))), length=2000)
    assert float(params) == pytest.approx(-2.0, rel=1e-5)


def test_the_sign_goes_on_firing_long_after_the_gradients_have_gone():
    tx = scale_by_lion()

    def step(state, _):
        u, state = tx.update(jnp.zeros(()), state)
        return state, u

    state = optax.ScaleByLionState(jnp.zeros((), jnp.int32), jnp.array(1e-3))
    _, u = jax.lax.scan(step, state, length=7500)
    assert np.all(u == 1)


@pytest.mark.parametrize("mode", ["smooth", "refined"])
@pytest.mark.parametrize("mu_dtype", [None, jnp.bfloat16])
def test_modes_beside_optax(mode, mu_dtype):
    kwargs = {"mu_dtype": mu_dtype, "mode": mode, "smooth_beta": 2.0}
    close = {"atol": 5e-3} if mu_dtype else {"rtol": 1e-5, "atol": 1e-6}  # optax rounds b2 m
    ours, theirs = scale_by_lion(**kwargs), optax.scale_by_lion(**kwargs)
    state = other = ours.init(jnp.zeros(200))
    for i in range(4):
        g = jnp.asarray(3 * normal(i, 200))
        u, state = ours.update(g, state)
        v, other = theirs.update(g, other)
        np.testing.assert_allclose(u, v, **close)
        chex.assert_trees_all_close(state.mu, other.mu, **close)


def test_lion_passes_its_options_on():
    params, g = jnp.zeros(3), jnp.array([0.5, -2.0, 30.0])
    tx = lion(1.0, weight_decay=0.0, mode="refined")
    u, _ = tx.update(g, tx.init(params), params)
    np.testing.assert_allclose(u, [-0.05, 0.2, -1.0], rtol=1e-6)
    tx = lion(1.0, weight_decay=0.0, mode="smooth", smooth_beta=3.0, mu_dtype=jnp.bfloat16)
    u, state = tx.update(g, tx.init(params), params)
    np.testing.assert_allclose(u, -np.tanh(0.3 * np.array(g)), rtol=1e-5)
    assert state[0].mu.dtype == jnp.bfloat16


@pytest.mark.parametrize("factor", [0.0, 0.25, 1.0])
def test_cautious_by_hand(factor):
    """Entries that disagree with the gradient are scaled, and the leaf by one over the mean."""
    m = np.array([1.0, 1.0, -1.0, -1.0, 1.0, 0.0])
    g = np.array([1.0, -1.0, -1.0, 1.0, -20.0, 0.0])
    c = np.sign(0.9 * m + 0.1 * g)
    assert c.tolist() == [1, 1, -1, -1, -1, 0]
    scale = np.array([1, factor, 1, factor, 1, factor])
    state = optax.ScaleByLionState(jnp.zeros((), jnp.int32), jnp.asarray(m, jnp.float32))
    u, new = scale_by_lion(cautious=factor).update(jnp.asarray(g, jnp.float32), state)
    np.testing.assert_allclose(u, c * scale / scale.mean(), rtol=1e-6)
    np.testing.assert_allclose(new.mu, 0.99 * m + 0.01 * g, rtol=1e-5)


def test_cautious_where_nothing_agrees_stands_still():
    state = optax.ScaleByLionState(jnp.zeros((), jnp.int32), jnp.ones(3))
    u, _ = scale_by_lion(cautious=0.0).update(-jnp.ones(3), state)
    assert u.tolist() == [0, 0, 0]


@pytest.mark.parametrize(("param", "grad", "mu_dtype", "mu", "update"), [
    ("bfloat16", "float32", None, "bfloat16", "float32"),
    ("float32", "bfloat16", None, "float32", "float32"),
    ("bfloat16", "bfloat16", "float32", "float32", "float32"),
    ("float32", "float32", "bfloat16", "bfloat16", "float32"),
    ("float16", "float16", None, "float16", "float16"),
])  # fmt: skip
def test_the_momentum_keeps_its_dtype_under_scan(param, grad, mu_dtype, mu, update):
    """optax.lion's becomes float32 after one step in the first case, which a scan refuses."""
    tx = lion(0.01, mu_dtype=mu_dtype)
    params = jnp.ones(8, param)

    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        return (optax.apply_updates(params, updates), state), updates

    grads = jnp.asarray(normal(0, 5, 8), grad)
    (params, state), updates = jax.lax.scan(step, (params, tx.init(params)), grads)
    assert (params.dtype, state[0].mu.dtype) == (param, mu)
    assert updates.dtype == (update if param == grad == update else "float32")


def test_few_signs_differ_with_a_bfloat16_momentum():
    grads = jnp.asarray(0.1 + normal(0, 100, 2000))
    full, half = scale_by_lion(), scale_by_lion(mu_dtype=jnp.bfloat16)
    s, t = full.init(jnp.zeros(2000)), half.init(jnp.zeros(2000))
    differ = []
    for g in grads:
        u, s = jax.jit(full.update)(g, s)
        v, t = jax.jit(half.update)(g, t)
        differ.append(np.mean(np.asarray(u) != np.asarray(v)))
    assert 0 < np.mean(differ[20:]) < 0.005


def test_a_run_of_optax_lion_may_go_on_here_and_back():
    params = {"w": jnp.asarray(normal(0, 30)), "b": jnp.zeros(2)}
    grads = [
        jax.tree.map(lambda p, i=i: jnp.asarray(normal(i, *p.shape)), params) for i in range(6)
    ]
    schedule = optax.cosine_decay_schedule(0.1, 10)
    theirs, ours = optax.lion(schedule), lion(schedule)
    chex.assert_trees_all_equal_structs(theirs.init(params), ours.init(params))
    whole, _ = train(theirs, params, grads)
    half, state = train(theirs, params, grads[:3])
    now = half[-1]
    for g in grads[3:]:
        updates, state = ours.update(g, state, now)
        now = optax.apply_updates(now, updates)
    chex.assert_trees_all_close(now, whole[-1], rtol=1e-6)


def test_the_published_pairs():
    assert from_adamw(3e-4, 0.01) == pytest.approx({"learning_rate": 3e-5, "weight_decay": 0.1})
    assert from_adamw(1e-3, 1.0) == pytest.approx({"learning_rate": 1e-4, "weight_decay": 10})
    scheduled = from_adamw(optax.linear_schedule(0.3, 0.0, 10), 0.1, ratio=3)
    assert scheduled["weight_decay"] == pytest.approx(0.3)
    assert [float(scheduled["learning_rate"](t)) for t in (0, 5)] == pytest.approx([0.1, 0.05])


def test_the_posts_rule():
    """Width 768: sigma .036 and alpha0 1.11e-3 give the rates the author trained with."""
    rates = lion_hparams(0.036, 1.11e-3)
    assert rates["learning_rate"] == pytest.approx(4e-5, rel=0.01)
    assert rates["weight_decay"] == pytest.approx(0.015, rel=0.03)
    alpha = lion_hparams(0.5, 0.01, kappa=0.1)["learning_rate"]
    assert [float(alpha(t)) for t in (0, 10, 30)] == pytest.approx([0.005, 0.0025, 0.00125])


@pytest.mark.parametrize(("call", "match"), [
    (lambda: lion(0.1, b1=1.5), r"b1 is 1.5, but must lie in \[0, 1\)"),
    (lambda: lion(0.1, b1=1.0), "b1 is 1.0"),
    (lambda: lion(0.1, b2=-3), "b2 is -3"),
    (lambda: lion(0.1, b2=float("nan")), "b2 is nan"),
    (lambda: lion(0.1, weight_decay=-0.1), "weight_decay is -0.1, but must be at least 0"),
    (lambda: lion(0.1, mode="soft"), "mode is 'soft', but must be one of"),
    (lambda: lion(0.1, cautious=1.5), r"cautious is 1.5, but must lie in \[0, 1\]"),
    (lambda: from_adamw(0.1, 0.1, ratio=0), "ratio is 0, but must be positive"),
    (lambda: lion_hparams(0), "sigma is 0"),
    (lambda: lion_hparams(1, alpha0=-1), "alpha0 is -1"),
    (lambda: lion_hparams(1, kappa=-1), "kappa is -1"),
])  # fmt: skip
def test_arguments_out_of_range(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_a_momentum_of_integers_is_refused():
    with pytest.raises(TypeError, match="mu_dtype is int32, but must be real and floating"):
        scale_by_lion(mu_dtype=jnp.int32)
