"""What every combiner promises, for all of `combiner_cases.CASES`.

`python tests/conformance/combiner_table.py` prints the outcome as combiner x check.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from combiner_cases import CASES, Case
from jax.sharding import Mesh, PartitionSpec

from blogjax.multitask.aggregate import aggregate
from blogjax.multitask.gram import combine, gram

SEED = 3
LOSSES = np.array([0.5, 1.0, 2.0])


@pytest.fixture(params=[pytest.param(case, id=name) for name, case in CASES.items()])
def case(request):
    """Checks that a case is known to fail must fail, or the reason given is no longer true."""
    case: Case = request.param
    name = request.node.name.removeprefix("test_")
    check, _, parameters = name.partition("[")
    case_id = next(k for k, v in CASES.items() if v is case)
    rest = parameters.removesuffix("]").replace(case_id, "").strip("-")
    reason = case.fails.get(f"{check}[{rest}]" if rest else check)
    if reason:
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True, raises=AssertionError))
    return case


def entries(k):
    """Combiners by (case, order of the tasks); what does not look at the order is there once."""
    found = {}
    for name, case in CASES.items():
        for order in {tuple(range(k)), (*range(2, k), *range(min(k, 2)))}:
            found[name, order] = case.make(order)
    first = {id(combiner): place for place, combiner in reversed(found.items())}
    return found, {place: first[id(combiner)] for place, combiner in found.items()}


@functools.cache
def programs(k):
    """All combiners in one program, for many matrices `[n, k, k]`: that compiles the fastest."""
    combiners, first = entries(k)

    def weights(matrix, key_data, losses):
        key = lambda: jax.random.wrap_key_data(key_data)  # noqa: E731  a key is used only once
        return {
            place: combiner(matrix, key=key(), losses=losses)
            for place, combiner in combiners.items()
            if first[place] == place
        }

    return jax.jit(jax.vmap(weights, (0, None, 0))), first


GRAM = jax.jit(jax.vmap(gram))
KEY_DATA = np.asarray(jax.random.key_data(jax.random.key(3)))
BATCH = 64


def weigh_all(case, gradients, losses=None, tasks=None, key_data=KEY_DATA):
    """Weights `[n, k]` in float64 for gradients `[n, k, d]`, n up to 64."""
    n, k, _ = np.shape(gradients)
    run, first = programs(k)
    fill = lambda x: np.resize(np.asarray(x, np.float32), (BATCH, *np.shape(x)[1:]))  # noqa: E731
    losses = fill(np.ones((n, k)) if losses is None else losses)
    name = next(name for name, other in CASES.items() if other is case)
    place = first[name, tuple(range(k) if tasks is None else tasks)]
    found = run(GRAM(fill(gradients)), key_data, losses)
    return np.asarray(found[place][:n], float)


def weigh(case, gradients, losses=None):
    """Weights `[k]` for gradients `[k, d]`."""
    return weigh_all(case, [gradients], None if losses is None else [losses])[0]


def triples(n=BATCH, d=3):
    return np.random.default_rng(0).normal(size=(n, 3, d)).astype(np.float32)


def sums(weights, gradients):
    return np.einsum("nk,nkd->nd", weights, gradients)


@pytest.mark.slow  # as all that compiles for another number of tasks
def test_one_task(case):
    """Its own gradient, times the factor that the case states."""
    weights = weigh(case, [[2.0, 0.0]], [3.0])
    np.testing.assert_allclose(weights, [case.one], rtol=1e-6)


def test_identical_tasks(case):
    weights = weigh(case, [[0.0, 2.0]] * 3, [3.0] * 3)
    np.testing.assert_allclose(weights.sum(), case.same, rtol=1e-6)
    assert (weights >= 0).all()


def test_no_conflict(case):
    """Orthogonal gradients: the weights that the case states."""
    weights = weigh(case, np.diag([1.0, 2.0, 4.0]), LOSSES)
    np.testing.assert_allclose(weights, case.apart, rtol=1e-5, atol=1e-7)


def test_permutation(case):
    """The same tasks in another order get the same weights."""
    order, gradients = [2, 0, 1], triples()
    losses = np.resize(LOSSES, (BATCH, 3))
    weights = weigh_all(case, gradients, losses)
    permuted = weigh_all(case, gradients[:, order], losses[:, order], order)
    np.testing.assert_allclose(permuted, weights[:, order], rtol=1e-3, atol=1e-5)


def rescaled(case, unit):
    """Combined gradients before and after the losses change their units."""
    gradients, losses, unit = triples(), np.resize(LOSSES, (BATCH, 3)), np.asarray(unit)
    others = unit[:, None] * gradients
    before = sums(weigh_all(case, gradients, losses), gradients)
    return before, sums(weigh_all(case, others, unit * losses), others)


def test_scale(case):
    """All losses in another unit: the power that the case states, for powers of two to the bit."""
    before, after = rescaled(case, [4.0, 4.0, 4.0])
    np.testing.assert_array_equal(after, 4.0**case.degree * before)


@pytest.mark.parametrize("task", range(3))
def test_scale_of_one(case, task):
    """One loss in another unit: no difference exactly where the case says so."""
    before, after = rescaled(case, np.where(np.arange(3) == task, 1000.0, 1.0))
    moved = np.linalg.norm(after - before, axis=1).max()
    assert (moved < 1e-4) == (task in case.indifferent), moved


def test_stationary(case):
    """Where no step lowers all losses there is none."""
    angles = np.radians([0.0, 100.0, 230.0])
    gradients = np.array([[1.0], [2.0], [1.5]]) * np.stack([np.cos(angles), np.sin(angles)], 1)
    weights = weigh(case, gradients)
    assert np.linalg.norm(weights @ gradients.astype(np.float32)) < 1e-5


@pytest.mark.slow
def test_zero_task(case):
    """A task without a gradient changes nothing of the direction that is best for the others."""
    gradients = np.array([[1.0, 0.0], [-1.0, 2.0], [0.0, 0.0]])
    weights = weigh(case, gradients)
    assert np.isfinite(weights).all()
    u, v = weights @ gradients, weigh(case, gradients[:2]) @ gradients[:2]
    np.testing.assert_allclose(u * np.linalg.norm(v), v * np.linalg.norm(u), atol=1e-5)
    assert np.linalg.norm(u) > 0.5 * np.linalg.norm(v)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan(case, value):
    """The weights fall back on equal ones, finite; the combined gradient shows what happened."""
    gradients = triples(1)[0]
    gradients[1, 2] = value
    weights = weigh(case, gradients)
    np.testing.assert_allclose(weights, case.total / 3, rtol=1e-6)
    u = combine(jnp.asarray(gradients), jnp.asarray(weights, jnp.float32))
    assert np.isfinite(u).tolist() == [True, True, False]


def test_bfloat16(case):
    """Gradients in bfloat16: the weights of the same numbers in float32, no more rounding."""
    gradients = jnp.asarray(triples(1, 40), jnp.bfloat16)
    exact = weigh_all(case, gradients.astype(jnp.float32))[0]
    matrix = GRAM(gradients)
    assert matrix.dtype == jnp.float32
    # The square root of the matrix has its products; weights see nothing else.
    root = np.linalg.cholesky(np.asarray(matrix, float))
    np.testing.assert_allclose(weigh_all(case, root)[0], exact, rtol=1e-5, atol=1e-6)
    u = combine(gradients[0], jnp.asarray(exact, jnp.float32))
    assert u.dtype == jnp.bfloat16
    expected = exact @ np.asarray(gradients[0], float)
    np.testing.assert_allclose(u.astype(jnp.float32), expected, rtol=2**-8, atol=1e-6)


@pytest.fixture(scope="module")
def on_eight_devices():
    """Gradients and losses `[8, 3, ...]`, all combined gradients, the key that was drawn from."""
    rng = np.random.default_rng(1)
    gradients = rng.normal(size=(8, 3, 5)).astype(np.float32)
    losses = rng.uniform(1, 2, size=(8, 3)).astype(np.float32)
    seen = []

    def step(gradients, losses):
        found = {}
        for name, case in CASES.items():
            tx = aggregate(case.make((0, 1, 2)), axis_name="x", seed=4)
            found[name], _ = tx.update(gradients[0], tx.init(None), losses=losses[0])
        return found

    def spy(matrix, *, key=None, losses=None):
        seen.append(np.asarray(jax.random.key_data(key)))
        return jnp.ones(len(matrix))

    tx = aggregate(spy, seed=4)
    tx.update(jnp.ones((3, 5)), tx.init(None))
    mesh, spec = Mesh(np.array(jax.devices()), ("x",)), PartitionSpec("x")
    eight = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=spec, out_specs=PartitionSpec()))
    return gradients, losses, eight(gradients, losses), seen[0]


# Slow to compile; tests/multitask does the same for two of them.
@pytest.mark.slow
def test_one_device_is_eight(case, on_eight_devices):
    """Gradients that differ over eight devices: the weights of their mean, on all of them."""
    gradients, losses, together, key_data = on_eight_devices
    name = next(name for name, other in CASES.items() if other is case)
    mean = gradients.mean(0, keepdims=True)
    weights = weigh_all(case, mean, losses.mean(0, keepdims=True), key_data=key_data)
    np.testing.assert_allclose(together[name], sums(weights, mean)[0], rtol=1e-5, atol=1e-6)


def test_vmap(case):
    """Many matrices at once: what each of them gets among copies of itself."""
    gradients = triples(8)
    losses = np.exp(np.random.default_rng(5).normal(size=(8, 3)))
    found = weigh_all(case, gradients, losses)
    alone = [weigh(case, g, row) for g, row in zip(gradients, losses, strict=True)]
    np.testing.assert_allclose(found, alone, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("tasks", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_descends(case, tasks):
    """No task's loss rises to first order, whatever the gradients."""
    gradients = triples()[:, :tasks]
    u = sums(weigh_all(case, gradients), gradients)
    norms = np.linalg.norm(gradients, axis=2)
    rates = np.einsum("nkd,nd->nk", gradients, u) / norms / norms.max(1, keepdims=True)
    assert rates.min() > -1e-5


def test_nonnegative(case):
    """No task is climbed, not even by the -1e-9 of a rounding."""
    weights = weigh_all(case, triples())
    assert np.isfinite(weights).all()
    assert (weights >= 0).all()
    assert (weights.sum(1) > 0).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_dtype(case, dtype):
    """The weights are float32 or better, one for each task."""
    combiner = case.make((0, 1, 2))
    weights = jax.eval_shape(
        lambda g: combiner(g, key=jax.random.key(0), losses=jnp.ones(3)), jnp.eye(3, dtype=dtype)
    )
    assert (weights.shape, weights.dtype) == ((3,), jnp.float32)


@pytest.mark.parametrize(
    "bad", [jnp.ones(3), jnp.ones((3, 2)), jnp.ones((0, 0)), jnp.eye(3, dtype=jnp.int32)],
    ids=["vector", "oblong", "no task", "integers"],
)  # fmt: skip
def test_bad_input(case, bad):
    with pytest.raises(ValueError, match="a Gram matrix is"):
        case.make((0, 1, 2))(bad, key=jax.random.key(0), losses=jnp.ones(3))
