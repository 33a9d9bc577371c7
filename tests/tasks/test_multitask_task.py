"""The multi-task task against numpy in float64, where the weights have closed forms."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from blogjax.multitask.loss_weighting import inverse_loss
from blogjax.multitask.registry import named_combiner
from blogjax.tasks.descent import PARAMETERS
from blogjax.tasks.multitask import MultitaskOutput, multitask_task
from blogjax.train import mesh as meshes
from blogjax.train import per_device

TRUNK_ONLY = {"trunk": True, "heads": False}
RATE = 0.05


def init(key):
    del key
    rng = np.random.default_rng(5)
    trunk, a, b = (rng.normal(size=shape) for shape in ((3, 2), 2, 2))
    params = {"trunk": trunk, "heads": {"a": a, "b": b}}
    return {"params": jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)}


def two_headed(params, model_state, batch, key):
    hidden = batch["x"] @ params["trunk"]
    outputs = jnp.stack([hidden @ params["heads"][name] for name in "ab"], axis=1)
    squares = jnp.square(outputs - batch["y"])
    return MultitaskOutput(
        squares, batch["known"], {"error": (squares[:, 1], batch["known"][:, 1])}
    )


def batch_of(step, rows=8):
    """Padding full of NaN, rows that count double, labels missing."""
    rng = np.random.default_rng(step)
    x, y = rng.normal(size=(rows, 3)), rng.normal(size=(rows, 2))
    weight = np.array([1, 2, 1, 0, 1, 1, 1, 0.5])[:rows]
    known = np.array([[1, 1], [1, 0], [1, 1], [1, 1], [0, 1], [1, 0], [1, 1], [2, 1]])[:rows]
    y[known == 0] = 1e6
    x[3], y[3] = np.nan, np.nan
    known = known.astype(np.float32)
    known[3] = np.nan
    batch = {"x": x, "y": y, "known": known, "weight": weight, "row": np.arange(rows)}
    return {k: jnp.asarray(v, jnp.int32 if k == "row" else jnp.float32) for k, v in batch.items()}


def gradients(params, batch):
    """Losses `[2]` and the gradients by trunk and own head, float64."""
    numbers = {k: np.asarray(v, np.float64) for k, v in batch.items()}
    keep = numbers["weight"] > 0
    x, y, known, weight = (numbers[k][keep] for k in ("x", "y", "known", "weight"))
    losses, of_trunk, of_heads = [], [], []
    for k, name in enumerate("ab"):
        rows = known[:, k] > 0
        share = weight[rows] * known[rows, k]
        share = share / share.sum()
        head = params["heads"][name]
        residual = x[rows] @ params["trunk"] @ head - y[rows, k]
        losses.append(share @ residual**2)
        slope = 2 * share * residual
        of_trunk.append(np.outer(x[rows].T @ slope, head))
        of_heads.append((x[rows] @ params["trunk"]).T @ slope)
    return np.array(losses), np.stack(of_trunk), of_heads


def min_norm(losses, vectors):
    """The post's closed form for two tasks."""
    g1, g2 = vectors
    a = np.clip(g2 @ (g2 - g1) / ((g1 - g2) @ (g1 - g2)), 0, 1)
    return np.array([a, 1 - a])


METHODS = {
    "min_norm": ({"combiner": "min_norm"}, min_norm),
    "min_norm by scan": ({"combiner": "min_norm", "mode": "scan"}, min_norm),
    "gradient_normalized": (
        {"combiner": named_combiner("gradient_normalized")},
        lambda losses, g: 1 / np.linalg.norm(g, axis=1),
    ),
    "inverse_loss": ({"weighting": inverse_loss}, lambda losses, g: 1 / losses),
    "mean": ({}, lambda losses, g: np.array([0.5, 0.5])),
}


@pytest.mark.parametrize(
    ("method", "shared", "view"),
    [
        ("min_norm", TRUNK_ONLY, "jit"),
        pytest.param("min_norm by scan", TRUNK_ONLY, "jit", marks=pytest.mark.slow),
        ("min_norm by scan", True, "shard_map"),
        pytest.param("gradient_normalized", TRUNK_ONLY, "shard_map", marks=pytest.mark.slow),
        pytest.param("inverse_loss", TRUNK_ONLY, "shard_map", marks=pytest.mark.slow),
        ("mean", True, "jit"),
    ],
)
def test_three_steps_in_float64(method, shared, view):
    options, weigh = METHODS[method]
    tx = optax.sgd(RATE, momentum=0.9)
    axis = None if view == "jit" else "rows"
    task = multitask_task(
        init, two_headed, tx, names=("a", "b"), shared=shared, axis_name=axis,
        ema_decay=0.15, **options,
    )  # fmt: skip
    step = task.step
    if axis is not None:
        mesh = meshes.make_mesh(devices=jax.devices()[:2])
        step = per_device.on_each_device(step, "rows", mesh, view, returns_state=False)
    step = jax.jit(step)
    state = task.init(jax.random.key(0))
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), state.params)
    momentum = jax.tree.map(np.zeros_like, params)
    ema = params
    for t in range(3):
        batch = batch_of(t)
        losses, of_trunk, of_heads = gradients(params, batch)
        vectors = of_trunk.reshape(2, -1)
        if shared is True:  # a head's gradient by the other task is zero
            zero = np.zeros(2)
            heads = [np.append(of_heads[0], zero), np.append(zero, of_heads[1])]
            vectors = np.concatenate([vectors, heads], axis=1)
        w = weigh(losses, vectors)
        of_head = w if shared is True else np.ones(2)
        g = {
            "trunk": np.tensordot(w, of_trunk, 1),
            "heads": {n: of_head[k] * of_heads[k] for k, n in enumerate("ab")},
        }
        momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, g)
        params = jax.tree.map(lambda p, m: p - RATE * m, params, momentum)
        rate = 1 - min(0.15, (1 + t) / (10 + t))
        ema = jax.tree.map(lambda e, p, rate=rate: e + rate * (p - e), ema, params)
        state, metrics = step(state, batch, jax.random.key(t))
        chex.assert_trees_all_close(state.params, params, rtol=2e-5, atol=2e-6)
        chex.assert_trees_all_close(state.ema, ema, rtol=2e-5, atol=2e-6)
        norm = lambda tree: np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(tree)))  # noqa: E731
        wanted = {
            "loss": losses.mean(), "loss/a": losses[0], "loss/b": losses[1], "error": losses[1],
            "weight/a": w[0], "weight/b": w[1], "grad_norm": norm(g), "param_norm": norm(params),
            "update_norm": RATE * norm(momentum), "skipped": 0, "nonfinite_tasks": 0,
        }  # fmt: skip
        if "combiner" in options:
            norms = np.linalg.norm(vectors, axis=1)
            wanted |= {
                "grad_norm/a": norms[0], "grad_norm/b": norms[1],
                "conflicts": vectors[0] @ vectors[1] < 0,
                "stationarity": np.linalg.norm(w @ vectors) / (w @ norms),
            }  # fmt: skip
        else:
            wanted["objective"] = w @ losses
        assert wanted.keys() | {"nonfinite"} == metrics.keys()
        for name, value in wanted.items():
            np.testing.assert_allclose(metrics[name], value, 3e-5, 1e-6, err_msg=name)
        assert not metrics["nonfinite"].flags.any()
    assert int(state.step) == 3


DIRECTIONS = np.array([[3.0, 0.0], [-1.0, 1.0], [0.0, 2.0]], np.float32)


def along(params, model_state, batch, key):
    """Losses whose gradients are given, one column of each row for each task."""
    return MultitaskOutput(jnp.einsum("bdk,d->bk", batch["directions"], params["w"]))


def stepper(losses, names, *, rate=1.0, **options):
    """A step from (1, 2) along given gradients, in a batch of two rows."""
    start = lambda key: {"params": {"w": jnp.array([1.0, 2.0])}}  # noqa: E731
    task = multitask_task(start, losses, optax.sgd(rate), names=names, **options)
    state = task.init(jax.random.key(0))
    step = jax.jit(lambda batch, key: task.step(state, batch, key))

    def take(directions, key=0, **more):
        columns = jnp.asarray(np.broadcast_to(np.transpose(directions), (2, 2, len(directions))))
        batch = {"weight": jnp.ones(2), "row": jnp.arange(2), "directions": columns, **more}
        new, metrics = step(batch, jax.random.key(key))
        return new.params["w"].tolist(), jax.device_get(metrics)

    return take


def test_conflicts_and_stationarity_by_hand():
    """One of three pairs conflicts. Opposite gradients: nothing is left; a single task: all."""

    def equal(gram, *, key=None, losses=None):
        return jnp.full(len(gram), 1 / len(gram))

    w, metrics = stepper(along, ("p", "q", "r"), combiner=equal)(DIRECTIONS)
    assert metrics["conflicts"] == pytest.approx(1 / 3)
    assert metrics["stationarity"] == pytest.approx(13**0.5 / (5 + 2**0.5))
    assert w == pytest.approx([1 - 2 / 3, 1.0])
    take = stepper(along, ("p", "q"), combiner=equal)
    w, metrics = take(np.array([[3.0, 4.0], [-3.0, -4.0]], np.float32))
    assert metrics["conflicts"] == 1 and metrics["stationarity"] == 0 and w == [1, 2]
    _, metrics = take(np.zeros((2, 2), np.float32))
    assert metrics["conflicts"] == metrics["stationarity"] == metrics["nonfinite_tasks"] == 0
    _, metrics = take(np.array([[np.nan, 0.0], [-3.0, -4.0]], np.float32))
    assert metrics["conflicts"] == 0 and metrics["skipped"] == 1
    alone = stepper(along, ["p"], combiner=equal, mode="scan")
    w, metrics = alone(np.array([[3.0, 4.0]], np.float32))
    assert metrics["conflicts"] == 0 and metrics["stationarity"] == 1 and w == [-2, -2]


@pytest.mark.parametrize("unit", [1e-6, 1e6])
@pytest.mark.parametrize("combiner", ["gradient_normalized", "pcgrad", "min_norm"])
def test_stationarity_has_no_unit(combiner, unit):
    """Unit vectors at an angle of 120 degrees, of which every combiner here makes a rhombus."""
    directions = unit * np.array([[1.0, 0.0], [-0.5, 0.75**0.5]], np.float32)
    _, metrics = stepper(along, ("p", "q"), combiner=combiner)(directions)
    assert metrics["stationarity"] == pytest.approx(0.5, rel=1e-5)


def test_the_combiner_is_given_a_key_of_the_steps_and_the_losses():
    def drawing(gram, *, key=None, losses=None):
        return losses + jax.random.uniform(key, losses.shape)

    take = stepper(along, ("p", "q", "r"), combiner=drawing)
    losses = DIRECTIONS @ np.array([1.0, 2.0])
    drawn = [take(DIRECTIONS, key=k)[1] for k in (1, 1, 2)]
    drawn = [np.array([m[f"weight/{n}"] for n in "pqr"]) - losses for m in drawn]
    assert all((d >= 0).all() and (d < 1).all() and len(set(d)) == 3 for d in drawn)
    assert (drawn[0] == drawn[1]).all() and (drawn[0] != drawn[2]).all()


def breakable(params, model_state, batch, key):
    """3 w_0 and b w_1, one of which is NaN where b is, the other's slope where a is 0."""
    p = 2 * params["w"][0] + jnp.sqrt(batch["a"] * params["w"][0])
    q = params["w"][1] * batch["b"]
    return MultitaskOutput(jnp.stack([p, q], 1), model_state={"seen": model_state["seen"] + 1})


@pytest.mark.parametrize(
    ("how", "by_slope"),
    [
        (
            {"combiner": "gradient_normalized"},
            [1, 1],
        ),  # NaN spreads by the zeros of the other's pass
        ({"combiner": "gradient_normalized", "mode": "scan"}, [1, 0]),
        ({"weighting": inverse_loss}, [0, 0]),  # the leaf alone is known
    ],
)
def test_nan_in_one_task_leaves_the_step_out_and_names_the_task(how, by_slope):
    start = lambda key: {"params": {"w": jnp.ones(2)}, "seen": jnp.zeros((), jnp.int32)}  # noqa: E731
    task = multitask_task(start, breakable, optax.adam(0.1), names=["p", "q"], ema_decay=0.5, **how)
    state = task.init(jax.random.key(0))
    step = jax.jit(task.step)
    batch = {"a": jnp.ones(2), "b": jnp.ones(2), "weight": jnp.ones(2), "row": jnp.arange(2)}
    bad_loss = {**batch, "b": jnp.array([1.0, jnp.nan])}
    bad_slope = {**batch, "a": jnp.zeros(2)}
    for t, (bad, named) in enumerate([(bad_loss, [0, 1]), (bad_slope, by_slope)], 1):
        new, metrics = step(state, bad, jax.random.key(0))
        kept = ("params", "ema", "model_state")
        chex.assert_trees_all_equal(*([getattr(s, name) for name in kept] for s in (state, new)))
        chex.assert_trees_all_equal(state.opt_state.inner, new.opt_state.inner)
        assert int(new.step) == int(metrics["skipped"]) == t
        assert int(metrics["nonfinite_tasks"]) == sum(named)
        found = metrics["nonfinite"]
        assert found.paths == ("task p", "task q", "w", PARAMETERS)
        assert found.flags.tolist() == [*named, True, False] and bool(found.recoverable)
        assert metrics["loss/p"] == 4 - t and np.isnan(metrics["loss/q"]) == (t == 1)
        if "combiner" in how:
            assert metrics["weight/p"] == metrics["weight/q"] == 0.5
            assert metrics["conflicts"] == 0
        state = new
    new, metrics = step(state, batch, jax.random.key(0))
    assert not metrics["nonfinite"].flags.any() and int(new.model_state["seen"]) == 1


def test_what_is_not_finite_is_not_named_in_a_step_that_was_taken():
    """Norms whose squares float32 lacks: equal weights, a finite step, counted."""
    take = stepper(along, ("p", "q"), combiner="gradient_normalized", rate=1e-25)
    w, metrics = take(np.array([[1e25, 0.0], [0.0, 1.0]], np.float32))
    assert metrics["nonfinite_tasks"] == 1 and metrics["skipped"] == 0
    assert not metrics["nonfinite"].flags.any()
    assert w == pytest.approx([0.5, 2.0])


def test_a_task_without_labels_has_loss_and_gradient_zero():
    """Which to the shortest vector in the hull is the best of all gradients, unless told."""

    def losses(params, model_state, batch, key):
        known = batch["known"]
        return along(params, model_state, batch, key)._replace(
            weights=known, metrics={"mean": (batch["x"], known[:, 1])}
        )

    more = {"known": jnp.array([[True, False], [True, False]]), "x": jnp.full(2, jnp.nan)}
    for combiner, moved, weight in (("gradient_normalized", 1, 0), ("min_norm", 0, 1)):
        w, metrics = stepper(losses, ("p", "q"), combiner=combiner)(DIRECTIONS[:2], **more)
        assert w == pytest.approx([1 - moved, 2])
        assert metrics["loss/q"] == metrics["grad_norm/q"] == metrics["mean"] == 0
        assert metrics["weight/q"] == weight


ROWS, TASKS = 6, 3
weights_like = functools.partial(arrays, np.float32, elements=st.sampled_from([0.0, 0.5, 1.0, 3.0]))


@functools.cache
def read_out(view):
    """The losses of a step as a function of what the batch holds."""
    axis = None if view == "jit" else "rows"
    task = multitask_task(
        lambda key: {"params": jnp.zeros(())},
        lambda p, ms, batch, key: MultitaskOutput(
            batch["losses"] + p, batch["known"] / batch["one"]  # 0 / 0 in padding
        ),
        optax.sgd(1.0), names=[str(k) for k in range(TASKS)], axis_name=axis,
    )  # fmt: skip
    step = task.step
    if axis is not None:
        mesh = meshes.make_mesh(devices=jax.devices()[:2])
        step = per_device.on_each_device(step, axis, mesh, view)
    state = task.init(jax.random.key(0))
    return jax.jit(lambda batch: step(state, batch, jax.random.key(0)))


@given(
    arrays(np.float32, (ROWS, TASKS), elements=st.sampled_from([-2.0, 0.25, 1.0, 7.0])),
    weights_like((ROWS, TASKS)),
    weights_like(ROWS),
    st.sampled_from(["jit", "shard_map"]),
)
def test_losses_are_means_over_the_labelled_rows_of_all_devices(losses, known, weight, view):
    hidden = losses.copy()
    hidden[(known == 0) | (weight == 0)[:, None]] = np.nan
    batch = {"losses": hidden, "known": known, "weight": weight, "row": np.arange(ROWS)}
    batch["one"] = np.ones_like(known)
    state, metrics = read_out(view)(batch)
    share = known.astype(np.float64) * weight[:, None]
    there = share.sum(axis=0) > 0
    means = [np.average(losses[:, k], weights=share[:, k]) if there[k] else 0 for k in range(TASKS)]
    found = [metrics[f"loss/{k}"] for k in range(TASKS)]
    np.testing.assert_allclose(found, means, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.params, -there.sum() / TASKS, rtol=1e-5)


def test_normalised_gradients_do_not_see_a_loss_in_another_unit():
    """To the bit, for a power of two; the mean of the losses does see it."""

    def scaled(params, model_state, batch, key):
        out = two_headed(params, model_state, batch, key)
        return MultitaskOutput(
            out.losses * jnp.stack([jnp.ones(8), batch["scale"]], 1), out.weights
        )

    batch = batch_of(0)
    for options, same in (({"combiner": "gradient_normalized"}, True), ({}, False)):
        task = multitask_task(init, scaled, optax.sgd(0.1), names=("a", "b"), **options)
        states = []
        step = jax.jit(task.step)
        for scale in (1.0, 1024.0):
            state = task.init(jax.random.key(0))
            states.append(step(state, {**batch, "scale": jnp.full(8, scale)}, jax.random.key(0))[0])
        equal = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), *(s.params for s in states))
        assert all(jax.tree.leaves(equal)) == same


def test_pairs_in_evaluation_count_the_rows_that_have_it():
    task = multitask_task(
        init, two_headed, optax.sgd(0.1), names=("a", "b"),
        evaluate=lambda params, ms, batch, key: {"v": (batch["x"][:, 0], batch["known"][:, 0]),
                                                 "all": batch["x"]},
    )  # fmt: skip
    batch = batch_of(0)
    sums = task.evaluate(task.init(jax.random.key(0)), batch, jax.random.key(0))
    share = np.delete(np.array([1, 2, 1, 0, 0, 1, 1, 1.0]), 3)
    x = np.delete(np.asarray(batch["x"]), 3, axis=0)
    np.testing.assert_allclose(sums["v"], [share @ x[:, 0], share.sum()], rtol=1e-5)
    assert sums["all"][0].shape == (3,) and float(sums["all"][1]) == 7.5
