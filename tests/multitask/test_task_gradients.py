import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from blogjax.multitask.gradient_normalized import gradient_normalized_weights
from blogjax.multitask.min_norm import min_norm_weights
from blogjax.multitask.task_gradients import (
    MODES,
    combined_gradient,
    shared_feature_gradient,
    task_gradients,
)

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(16, 4)).astype(np.float32), RNG.normal(size=(16, 3)).astype(np.float32)
PARAMS = {"trunk": {"w": RNG.normal(size=(4, 6)).astype(np.float32) / 2,
                    "b": RNG.normal(size=6).astype(np.float32)},
          "heads": RNG.normal(size=(6, 3)).astype(np.float32)}  # fmt: skip
SHARED = {"trunk": True, "heads": False}


def encode(trunk, x):
    return jnp.tanh(jnp.dot(x, trunk["w"]) + jnp.broadcast_to(trunk["b"], (len(x), 6)))


def head_losses(h, heads, y):
    """Three regressions; each task has its column of the heads."""
    return jnp.mean((h @ heads - y) ** 2, axis=0) * jnp.array([1.0, 10.0, 0.1])


def losses(params, x=X, y=Y):
    return head_losses(encode(params["trunk"], x), params["heads"], y)


@jax.jit
def one_by_one(params):
    """Losses and gradients by `jax.grad`, task by task."""
    return [jax.grad(lambda p: losses(p)[i])(params) for i in range(3)]  # noqa: B023


def flat(tree):
    return np.concatenate([np.asarray(x, float).reshape(-1) for x in jax.tree.leaves(tree)])


def close(a, b, **tolerances):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **({"rtol": 2e-5, "atol": 1e-6} | tolerances))


def test_every_gradient_at_once():
    found = jax.jit(functools.partial(task_gradients, losses))(PARAMS)
    np.testing.assert_allclose(found.losses, losses(PARAMS), rtol=1e-6)
    for i, gradient in enumerate(one_by_one(PARAMS)):
        close(jax.tree.map(lambda x: x[i], found.gradients), gradient)  # noqa: B023
    assert found.aux is None


@pytest.mark.parametrize("shared", [True, SHARED], ids=["all", "trunk"])
@pytest.mark.parametrize("mode", MODES)
def test_combined(mode, shared):
    """Against the gradients one by one: their products, 1 / norms, the sum for the heads."""
    combined = functools.partial(
        combined_gradient, losses, combiner=gradient_normalized_weights, mode=mode, shared=shared
    )
    found = jax.jit(combined)(PARAMS)
    gradients = one_by_one(PARAMS)
    g = np.stack([flat(x if shared is True else x["trunk"]) for x in gradients])
    np.testing.assert_allclose(found.gram, g @ g.T, rtol=2e-5, atol=1e-5)
    np.testing.assert_array_equal(found.gram, found.gram.T)
    weights = 1 / np.linalg.norm(g, axis=1)
    np.testing.assert_allclose(found.weights, weights, rtol=1e-5)
    np.testing.assert_allclose(found.losses, losses(PARAMS), rtol=1e-6)
    expected = jax.tree.map(lambda *x: sum(w * a for w, a in zip(weights, x, strict=True)),
                            *gradients)  # fmt: skip
    if shared is not True:
        expected["heads"] = sum(x["heads"] for x in gradients)
    close(found.gradient, expected)
    assert found.aux is None


@pytest.mark.slow  # seconds of compiling
@pytest.mark.parametrize("mode", MODES)
def test_aux_losses_and_keys_reach_where_they_belong(mode):
    seen = {}

    def combiner(matrix, *, key=None, losses=None):
        seen.update(key=key, losses=losses)
        return jnp.array([0.0, 1.0, 0.0])

    found = combined_gradient(
        lambda p: (losses(p), {"h": p["heads"].sum()}), PARAMS, combiner, mode=mode,
        key=jax.random.key(1), has_aux=True,
    )  # fmt: skip
    np.testing.assert_allclose(found.aux["h"], PARAMS["heads"].sum(), rtol=1e-6)
    np.testing.assert_allclose(seen["losses"], losses(PARAMS), rtol=1e-6)
    assert seen["key"] == jax.random.key(1)
    close(found.gradient, one_by_one(PARAMS)[1])


def eight():
    return Mesh(np.array(jax.devices()), ("data",))


@functools.cache
def on_one_device():
    combined = functools.partial(
        combined_gradient, losses, combiner=gradient_normalized_weights, shared=SHARED
    )
    return jax.jit(combined)(PARAMS)


@pytest.mark.parametrize("check_vma", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_one_device_is_eight(mode, check_vma):
    """The weights of the global batch, though the devices' own losses and products differ.

    Also with `check_vma`, under which jax sums gradients by replicated parameters by itself.
    """

    def combined(params, x, y):
        return combined_gradient(
            lambda p: losses(p, x, y), params, gradient_normalized_weights, mode=mode,
            shared=SHARED, axis_name="data",
        )  # fmt: skip

    mapped = jax.shard_map(combined, mesh=eight(), in_specs=(P(), P("data"), P("data")),
                           out_specs=P(), check_vma=check_vma)  # fmt: skip
    close(jax.jit(mapped)(PARAMS, X, Y), on_one_device(), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_one_device_is_eight_for_the_exact_combiner(mode):
    def combined(params, x, y):
        return combined_gradient(lambda p: losses(p, x, y), params, min_norm_weights, mode=mode,
                                 axis_name="data")  # fmt: skip

    mapped = jax.shard_map(combined, mesh=eight(), in_specs=(P(), P("data"), P("data")),
                           out_specs=P())  # fmt: skip
    alone = combined_gradient(losses, PARAMS, min_norm_weights)
    close(jax.jit(mapped)(PARAMS, X, Y), alone, rtol=1e-5)
    view = jax.pmap(combined, axis_name="data", in_axes=(None, 0, 0))
    rows = view(PARAMS, X.reshape(8, 2, 4), Y.reshape(8, 2, 3))
    close(jax.tree.map(lambda x: x[3], rows), alone, rtol=1e-5)


def features(axis_name=None):
    def combined(params, x, y):
        return shared_feature_gradient(
            lambda trunk: encode(trunk, x), lambda h, heads: head_losses(h, heads, y),
            params["trunk"], params["heads"], gradient_normalized_weights, axis_name=axis_name,
        )  # fmt: skip

    return combined


def test_shared_features():
    """The Gram matrix of the gradients by the features, by `jax.jacfwd`."""
    found = jax.jit(features())(PARAMS, X, Y)
    by_h = jax.jit(jax.jacfwd(lambda h: head_losses(h, PARAMS["heads"], Y)))(
        encode(PARAMS["trunk"], X)
    )
    g = np.stack([flat(x) for x in by_h])
    np.testing.assert_allclose(found.gram, g @ g.T, rtol=2e-5, atol=1e-7)
    weights = 1 / np.linalg.norm(g, axis=1)
    np.testing.assert_allclose(found.weights, weights, rtol=1e-5)
    gradients = one_by_one(PARAMS)
    trunk = jax.tree.map(lambda *x: sum(w * a for w, a in zip(weights, x, strict=True)),
                         *[x["trunk"] for x in gradients])  # fmt: skip
    close(found.gradient, (trunk, sum(x["heads"] for x in gradients)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("check_vma", [False, True])
def test_shared_features_on_eight_devices(check_vma):
    mapped = jax.shard_map(features("data"), mesh=eight(), in_specs=(P(), P("data"), P("data")),
                           out_specs=P(), check_vma=check_vma)  # fmt: skip
    close(jax.jit(mapped)(PARAMS, X, Y), jax.jit(features())(PARAMS, X, Y), rtol=1e-5)


def test_features_of_tasks_with_examples_of_their_own_are_orthogonal():
    """The post's remark on when this bound is useless."""

    def own(h, heads):
        return jnp.stack([jnp.mean(h[:8] ** 2), jnp.mean((h[8:] @ heads) ** 2)])

    found = jax.jit(lambda trunk, heads: shared_feature_gradient(
        lambda trunk: encode(trunk, X), own, trunk, heads, gradient_normalized_weights
    ))(PARAMS["trunk"], PARAMS["heads"])  # fmt: skip
    assert float(found.gram[0, 1]) == 0


def temporary_bytes(mode, tasks):
    """What a step needs besides arguments and result, for a million parameters."""
    width = 1000

    def many(w):
        h = jnp.tanh(jnp.ones((1, width)) @ w)[0]
        return jnp.mean(h[: 16 * (width // 16)].reshape(16, -1) ** 2, axis=1)[:tasks]

    def step(w):
        return combined_gradient(many, w, gradient_normalized_weights, mode=mode).gradient

    shape = jax.ShapeDtypeStruct((width, width), jnp.float32)
    options = {"xla_backend_optimization_level": "3"}
    compiled = jax.jit(step).lower(shape).compile(compiler_options=options)
    return compiled.memory_analysis().temp_size_in_bytes


def test_the_memory_of_scan_does_not_grow_with_the_tasks():
    one_gradient = 4 * 1000 * 1000
    few, more = temporary_bytes("scan", 2), temporary_bytes("scan", 16)
    assert more - few < 0.1 * one_gradient
    assert more < 3 * one_gradient
    # All at once it does grow, by a gradient for each task: so this can tell.
    assert temporary_bytes("jacrev", 16) - temporary_bytes("jacrev", 2) > 10 * one_gradient


@pytest.mark.parametrize("mode", MODES)
def test_bfloat16_parameters(mode):
    """The gradient keeps their type; the products are float32, of gradients in bfloat16."""
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), PARAMS)

    def half(p):
        x, y = jnp.asarray(X, jnp.bfloat16), jnp.asarray(Y, jnp.bfloat16)
        h = encode(p["trunk"], x)
        return jnp.mean((h @ p["heads"] - y).astype(jnp.float32) ** 2, axis=0)

    found = jax.jit(lambda p: combined_gradient(half, p, gradient_normalized_weights, mode=mode))(
        params
    )
    assert found.gram.dtype == found.weights.dtype == jnp.float32
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(found.gradient))
    scale = np.array([1.0, 10.0, 0.1])[:, None]  # which `losses` has
    exact = one_by_one(PARAMS)
    g = np.stack([flat(x) for x in exact]) / scale
    norms = np.linalg.norm(g, axis=1)
    error = np.abs(np.asarray(found.gram, float) - g @ g.T) / norms / norms[:, None]
    assert error.max() < 0.03


def test_one_task():
    found = combined_gradient(
        lambda w: jnp.sum(w**2)[None], jnp.array([3.0, 4.0]), gradient_normalized_weights
    )
    np.testing.assert_allclose(found.gradient, [0.6, 0.8], rtol=1e-6)


W = jnp.ones(2)
BAD = {
    "column": (lambda w: w[:, None], r"got shape \(2, 1\); jnp.stack"),
    "scalar": (lambda w: w.sum(), r"got shape \(\); jnp.stack"),
    "no task": (lambda w: w[:0], r"at least 1, got shape \(0,\)"),
    "tuple": (lambda w: (w[0], w[1]), "array .K., got tuple; jnp.stack scalars"),
    "aux not announced": (lambda w: (w, 1.0), "got tuple.*has_aux=True"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_losses(bad):
    function, message = BAD[bad]
    uses = [
        lambda: task_gradients(function, W),
        lambda: combined_gradient(function, W, gradient_normalized_weights),
        lambda: combined_gradient(function, W, gradient_normalized_weights, mode="scan"),
        lambda: shared_feature_gradient(lambda t: t, lambda h, _: function(h), W, W,
                                        gradient_normalized_weights),
    ]  # fmt: skip
    for use in uses:
        with pytest.raises(ValueError, match=message):
            use()


@pytest.mark.parametrize("mode", ["jacrev", "scan"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 1)])
def test_a_combiner_of_other_weights(mode, shape):
    def wrong(gram, *, key=None, losses=None):
        return jnp.ones(shape)

    with pytest.raises(ValueError, match=r"weights of shape \(.*\) for 2 tasks"):
        combined_gradient(lambda w: w, W, wrong, mode=mode)


@pytest.mark.parametrize("mode", ["jacrev", "scan"])
def test_shared_that_is_no_bool(mode):
    with pytest.raises(ValueError, match="shared must be bools, got 'w'"):
        combined_gradient(lambda w: w, W, gradient_normalized_weights, mode=mode, shared="w")


def test_features_without_heads():
    found = shared_feature_gradient(
        lambda t: t[None] * jnp.ones((4, 2)), lambda h, _: jnp.mean(h, axis=0), W, (),
        gradient_normalized_weights,
    )  # fmt: skip
    # Each loss's gradient by the features has length 1/4 * 2: the weights are 2.
    np.testing.assert_allclose(found.gradient[0], [2.0, 2.0], rtol=1e-6)
    assert found.gradient[1] == ()


def test_complex_losses():
    with pytest.raises(ValueError, match="real numbers, got complex64"):
        task_gradients(lambda w: w * 1j, W)


def test_unknown_modes_list_the_valid_ones():
    with pytest.raises(ValueError, match="'both', but must be one of jacrev, scan"):
        combined_gradient(losses, PARAMS, gradient_normalized_weights, mode="both")  # pyright: ignore[reportArgumentType]
