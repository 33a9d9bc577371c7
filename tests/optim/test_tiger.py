"""Tiger against numpy in float64 and optax."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optimiser_steps import normal, path_of_steps

from blogjax.optim.lion import lion
from blogjax.optim.tiger import default_labels, scale_by_param_rms, tiger

SHAPES = {"kernel": (3, 4), "bias": (4,), "scale": (4,), "embedding": (5, 4)}


def tree(seed, dtype=jnp.float32):
    return {
        name: jnp.asarray(normal(seed + 10 * i, *shape), dtype)
        for i, (name, shape) in enumerate(SHAPES.items())
    }


def plain(params):
    return jax.tree.map(lambda _: "plain", params)


def reference(name, theta, gradients, lr, b, wd, k=1, s=0.99):
    """One leaf in numpy, written as the post has it; lr(number of the update)."""
    theta, m = np.asarray(theta, np.float64), np.zeros(np.shape(theta))
    path = []
    for t, g in enumerate(gradients):
        g = np.asarray(g, np.float64)
        if not np.isfinite(g).all():
            centre = 1.0 if name == "scale" else 0.0
            theta = (theta - centre) * s + centre
            path.append(theta)
            continue
        m = (b if t % k == 0 else 1.0) * m + (1 - b) * g / k
        if (t + 1) % k == 0:
            if name == "kernel":
                eta = np.sqrt(np.mean(theta**2))
            elif name == "embedding":
                eta = np.sqrt(np.mean(theta**2, axis=-1, keepdims=True))
            else:
                eta = 0.5
            decay = wd if name in ("kernel", "embedding") else 0.0
            theta = theta - lr(t // k) * eta * (np.sign(m) + decay * theta)
        path.append(theta)
    return path, m


@pytest.mark.parametrize("k", [1, 3])
def test_every_label_against_numpy(k, x64):
    gradients = [tree(100 + t, jnp.float64) for t in range(12)]
    for t, name, value in [(4, "kernel", np.nan), (5, "scale", np.inf), (8, "embedding", -np.inf)]:
        gradients[t][name] = gradients[t][name].at[1].set(value)
    lr = lambda t: 0.1 / (t + 1)  # noqa: E731
    params = tree(0, jnp.float64)
    path, state = path_of_steps(tiger(lr, 0.9, 0.2, accumulate_steps=k), params, gradients)
    for name in SHAPES:
        expected, m = reference(name, params[name], [g[name] for g in gradients], lr, 0.9, 0.2, k)
        seen = np.stack([p[name] for p in path])
        np.testing.assert_allclose(seen, np.stack(expected), rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(state[0].mu[name], m, rtol=1e-12, atol=1e-15)


def test_defaults_are_the_posts():
    params, g = tree(0), tree(1)
    path, state = path_of_steps(tiger(1e-3), params, [g])
    for name in SHAPES:
        expected, m = reference(name, params[name], [g[name]], lambda t: 1e-3, 0.965, 0.01)
        np.testing.assert_allclose(path[0][name], expected[0], rtol=1e-6)
        np.testing.assert_allclose(state[0].mu[name], m, rtol=1e-5)


def test_four_microbatches_are_one_mean_gradient(x64):
    micro = [tree(t, jnp.float64) for t in range(24)]
    means = [jax.tree.map(lambda *g: sum(g) / 4, *micro[i : i + 4]) for i in range(0, 24, 4)]
    hidden, state = path_of_steps(tiger(0.01, accumulate_steps=4), tree(99, jnp.float64), micro)
    plainly, other = path_of_steps(tiger(0.01), tree(99, jnp.float64), means)
    chex.assert_trees_all_close(hidden[3::4], plainly, rtol=1e-14)
    chex.assert_trees_all_close(state[0].mu, other[0].mu, rtol=1e-13)


def test_between_updates_no_bit_changes():
    params = {"kernel": jnp.array([-0.0, 0.0, 1.0])}
    path, state = path_of_steps(tiger(0.1, accumulate_steps=3), params, [params] * 5)
    bits = [np.asarray(p["kernel"]).tobytes() for p in [params, *path]]
    assert bits[0] == bits[1] == bits[2] != bits[3] == bits[4] == bits[5]
    assert state[0].position == state[1].position == 2


def test_multisteps_of_lion_needs_one_more_buffer_for_the_same_steps():
    params, micro = tree(0), [tree(t) for t in range(1, 13)]
    multi = optax.MultiSteps(lion(0.01, 0.9, 0.9, weight_decay=0.1), 4).gradient_transformation()
    hidden = tiger(0.01, 0.9, 0.1, accumulate_steps=4, param_labels=plain)
    a, big = path_of_steps(multi, params, micro)
    b, small = path_of_steps(hidden, params, micro)
    chex.assert_trees_all_close(a, b, rtol=1e-6, atol=1e-7)
    one = sum(x.nbytes for x in jax.tree.leaves(params))
    assert sum(x.nbytes for x in jax.tree.leaves(small)) == one + 8
    assert sum(x.nbytes for x in jax.tree.leaves(big)) >= 2 * one


def test_plain_labels_are_lion_with_equal_rates():
    params, grads = tree(0), [tree(t) for t in range(1, 20)]
    a, _ = path_of_steps(tiger(0.01, 0.9, 0.1, param_labels=plain), params, grads)
    b, _ = path_of_steps(optax.lion(0.01, 0.9, 0.9, weight_decay=0.1), params, grads)
    chex.assert_trees_all_close(a, b, rtol=1e-5, atol=1e-6)


UNDECAYED = tiger(0.01, weight_decay=0.0)


@given(st.integers(-15, 15))
def test_steps_are_relative_to_the_parameters(power):
    grads = [{"kernel": jnp.asarray(normal(t, 6, 5), jnp.float32)} for t in range(5)]
    params = {"kernel": jnp.asarray(normal(9, 6, 5), jnp.float32)}
    a, _ = path_of_steps(UNDECAYED, params, grads)
    scaled = jax.tree.map(lambda p: p * 2.0**power, params)
    b, _ = path_of_steps(UNDECAYED, scaled, grads)
    chex.assert_trees_all_equal(jax.tree.map(lambda p: p * 2.0**power, a), b)


@pytest.mark.slow  # seconds of compiling
@pytest.mark.parametrize("fault", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("mu_dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize("k", [1, 4])
def test_a_bad_leaf_shrinks_and_the_others_go_on(fault, mu_dtype, k):
    tx = tiger(0.01, accumulate_steps=k, mu_dtype=mu_dtype)
    good, bad = tree(1), tree(2)
    bad["scale"] = bad["scale"].at[0].set(fault)
    params = tree(0)
    _, state = tx.update(good, tx.init(params), params)
    # A negative zero in the momentum must survive as well.
    state[0].mu["scale"] = state[0].mu["scale"].at[0].set(-0.0)
    updates, after = tx.update(bad, state, params)
    moved = optax.apply_updates(params, updates)
    np.testing.assert_allclose(moved["scale"], 1 + 0.99 * (params["scale"] - 1), rtol=1e-6)
    kept = [np.asarray(s[0].mu["scale"]).tobytes() for s in (state, after)]
    assert kept[0] == kept[1]
    fine, other = tx.update(tree(2), state, params)
    for name in ("kernel", "bias", "embedding"):
        chex.assert_trees_all_equal(updates[name], fine[name])
        chex.assert_trees_all_equal(after[0].mu[name], other[0].mu[name])


@pytest.mark.parametrize(("shrink", "expected"), [(1.0, 2.0), (0.5, 1.0), (0.0, 0.0)])
def test_how_far_it_shrinks(shrink, expected):
    params = {"kernel": jnp.full(2, 2.0)}
    bad = {"kernel": jnp.array([1.0, jnp.nan])}
    path, _ = path_of_steps(tiger(0.1, shrink=shrink), params, [bad])
    assert path[0]["kernel"].tolist() == [expected, expected]


def test_without_the_rule_nan_goes_through():
    params = {"kernel": jnp.ones(2)}
    path, _ = path_of_steps(
        tiger(0.1, shrink=None), params, [{"kernel": jnp.array([1.0, jnp.nan])}]
    )
    assert np.isnan(path[0]["kernel"]).tolist() == [False, True]


def test_the_floor_is_per_row_for_embeddings():
    params = {"embedding": jnp.array([[0.0, 0.0], [3.0, 4.0]])}
    tx = scale_by_param_rms(floor=0.5)
    u, _ = tx.update({"embedding": jnp.ones((2, 2))}, tx.init(params), params)
    np.testing.assert_allclose(u["embedding"], [[0.5] * 2, [12.5**0.5] * 2], rtol=1e-6)


def test_no_warning_where_nothing_can_be_seen_or_nothing_is_wrong():
    zeros = {"kernel": jnp.zeros((2, 3)), "empty": jnp.zeros((0, 3))}
    jax.eval_shape(tiger(0.1).init, zeros)
    tiger(0.1).init({"bias": jnp.zeros(3), "empty": jnp.zeros((0, 3))})
    tiger(0.1, floor=0.1).init(zeros)


def test_the_rms_is_taken_in_float32():
    """In float16 the square of 300 overflows."""
    params = {"kernel": jnp.full(4, 300.0, jnp.float16)}
    tx = scale_by_param_rms()
    u, _ = tx.update({"kernel": jnp.ones(4, jnp.float16)}, tx.init(params), params)
    assert u["kernel"].dtype == jnp.float16
    assert u["kernel"].tolist() == [300.0] * 4


class Net(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        return nn.Dense(2)(nn.LayerNorm()(nn.Embed(5, 4)(tokens)))


def test_labels_of_a_flax_network():
    params = Net().init(jax.random.key(0), jnp.zeros(3, jnp.int32))["params"]
    assert default_labels(params) == {
        "Embed_0": {"embedding": "embedding"},
        "LayerNorm_0": {"scale": "gain", "bias": "bias"},
        "Dense_0": {"kernel": "weight", "bias": "bias"},
    }
    assert default_labels({"beta": 0, "gamma": 0, "embeddings": 0, "w": [0]}) == {
        "beta": "bias", "gamma": "gain", "embeddings": "embedding", "w": ["weight"],
    }  # fmt: skip


def test_labels_may_be_given_as_a_tree():
    params, g = {"a": jnp.full(2, 4.0), "b": jnp.full(2, 4.0)}, {"a": jnp.ones(2), "b": jnp.ones(2)}
    path, _ = path_of_steps(
        tiger(0.5, weight_decay=0.0, param_labels={"a": "weight", "b": "bias"}), params, [g]
    )
    assert path[0]["a"].tolist() == [2.0, 2.0]
    assert path[0]["b"].tolist() == [3.75, 3.75]


def test_hyper_parameters_may_be_traced():
    params, micro = tree(0), [tree(t) for t in range(1, 7)]
    a, _ = path_of_steps(tiger(0.01, accumulate_steps=3, floor=0.1), params, micro)
    injected = optax.inject_hyperparams(tiger)(0.01, accumulate_steps=3, floor=0.1)
    b, state = path_of_steps(injected, params, micro)
    chex.assert_trees_all_close(a, b, rtol=1e-5)
    assert {"b", "accumulate_steps", "shrink"} <= state.hyperparams.keys()


@pytest.mark.parametrize(("call", "match"), [
    (lambda: tiger(0.1, b=1.0), r"b is 1.0, but must lie in \[0, 1\)"),
    (lambda: tiger(0.1, weight_decay=-1), "weight_decay is -1"),
    (lambda: tiger(0.1, accumulate_steps=0), "accumulate_steps is 0, but must be at least 1"),
    (lambda: tiger(0.1, shrink=1.1), "shrink is 1.1"),
    (lambda: tiger(0.1, floor=-1.0), "floor is -1.0"),
    (lambda: tiger(0.1, param_labels={"a": "wait"}).init({"a": jnp.ones(1)}), "a is labelled"),
    (lambda: tiger(0.1, param_labels={"a": "bias"}).init({"b": jnp.ones(1)}), "for a tree of"),
    (lambda: tiger(0.1).update({}, tiger(0.1).init({})), "tiger needs the parameters"),
    (lambda: scale_by_param_rms().update({}, optax.EmptyState()), "rms needs the parameters"),
])  # fmt: skip
def test_arguments_out_of_range(call, match):
    with pytest.raises(ValueError, match=match):
        call()
