"""The vote against a count in numpy, on simulated and on virtual devices; its bytes in the HLO."""

import functools
import re

import chex
import hypothesis.extra.numpy as arrays
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec

from blogjax.core.per_device import PerDevice, partition_specs, spread
from blogjax.optim import majority_vote as module
from blogjax.optim.accumulate import accumulate
from blogjax.optim.hidden_accumulation import emit_every
from blogjax.optim.lion import lion, scale_by_lion
from blogjax.optim.majority_vote import (
    MajorityVoteState,
    distributed_lion,
    majority,
    majority_vote,
    pack,
    unpack,
)
from blogjax.optim.per_device_state import per_device_state
from blogjax.optim.sparse_rows import lazy_rows

AXIS = "workers"


def counted(votes, first):
    """The rule in words, entry by entry: `votes` is `[W, n]`, `first` decides ties."""
    votes = np.asarray(votes, np.float64)
    out = []
    for column in np.sign(votes).T:
        if np.isnan(column).any():
            out.append(np.nan)
        elif column.sum() != 0:
            out.append(np.sign(column.sum()))
        else:
            order = [*column[first:], *column[:first]]
            out.append(next((v for v in order if v), 0.0))
    return np.array(out)


@functools.cache
def simulated(axis=AXIS):
    tx = majority_vote(axis)
    update = lambda u, count: tx.update(u, MajorityVoteState(count))[0]  # noqa: E731
    return jax.jit(jax.vmap(update, in_axes=(0, None), axis_name=axis))


ENTRIES = st.sampled_from([-2.0, -1e-39, -0.0, 0.0, 1.2e-38, 3.0, np.inf, -np.inf, np.nan])


@pytest.mark.slow  # seconds of compiling
@given(
    votes=st.integers(1, 6).flatmap(lambda w: arrays.arrays(np.float32, (w, 7), elements=ENTRIES)),
    count=st.integers(0, 100),
)
def test_it_is_the_count_in_numpy(votes, count):
    voters = len(votes)
    result = simulated()({"a": votes[:, :5].reshape(voters, 5, 1), "b": votes[:, 5:]}, count)
    # 1e-39 is no normal number: XLA takes it for 0 on a CPU.
    expected = counted(np.where(abs(votes) < 1.1e-38, 0, votes), count % voters)
    for row in range(voters):
        got = np.concatenate([result["a"][row].ravel(), result["b"][row].ravel()])
        np.testing.assert_array_equal(got, expected)


def test_a_nan_is_told_where_nobody_abstains():
    got = simulated()(jnp.array([[1.0, 2.0], [np.nan, -1.0], [1.0, -1.0]]), 0)
    np.testing.assert_array_equal(got, [[np.nan, -1.0]] * 3)


@pytest.mark.parametrize(
    "voters",
    [2, 8, pytest.param(7, marks=pytest.mark.slow), pytest.param(33, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("abstain", [0.0, 0.5], ids=["all vote", "some abstain"])
def test_many_voters_and_entries(voters, abstain):
    rng = np.random.default_rng(voters)
    votes = rng.normal(size=(voters, 1003)) * (rng.random((voters, 1003)) >= abstain)
    got = simulated()(jnp.asarray(votes, jnp.float32), 5)
    np.testing.assert_array_equal(got[0], counted(votes, 5 % voters))
    assert all(np.array_equal(row, got[0]) for row in got)


@given(arrays.arrays(np.bool_, 96))
def test_packing_is_undone(bits):
    words = pack(jnp.asarray(bits))
    chex.assert_shape(words, (3,))
    assert words.dtype == jnp.uint32
    np.testing.assert_array_equal(unpack(words), bits)


@given(
    votes=st.integers(1, 9).flatmap(lambda w: arrays.arrays(np.uint32, (w, 2))),
    first=st.integers(0, 8),
)
def test_majority_of_words_is_that_of_their_bits(votes, first):
    first %= len(votes)
    bits = (votes[:, :, None] >> np.arange(32, dtype=np.uint32)) & 1
    expected = counted(bits.reshape(len(votes), -1) * 2.0 - 1, first) > 0
    signs, present = jax.device_get(jax.jit(majority)(votes, None, first))
    got = (signs[:, None] >> np.arange(32, dtype=np.uint32)) & 1
    np.testing.assert_array_equal(got.ravel(), expected)
    assert np.all(present == 0xFFFFFFFF)


def test_ties_prefer_no_direction_and_go_round():
    """One yes, one no: the device whose turn it is decides."""
    votes = jnp.array([[1.0, -1.0], [-1.0, 1.0]])
    tx = majority_vote(AXIS)
    got, state = [], tx.init(votes[0])
    for _ in range(3):
        state, u = jax.vmap(
            lambda v, s: tx.update(v, s)[::-1],
            in_axes=(0, None),
            axis_name=AXIS,
            out_axes=(None, 0),
        )(votes, state)
        got.append(u[0].tolist())
    assert got == [[1.0, -1.0], [-1.0, 1.0], [1.0, -1.0]]


@pytest.mark.slow  # seconds of compiling
@pytest.mark.parametrize("size", [1, 40, 64, 10**6])
def test_leaves_vote_in_groups(monkeypatch, size):
    """Whatever is grouped with what: the same outcome, in each leaf's shape and dtype."""
    monkeypatch.setattr(module, "_BUCKET", size)
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 5, 7), "b": (), "c": (0, 4), "d": (33,), "e": (32, 2)}
    votes = {k: rng.integers(-1, 2, (5, *shape)).astype(np.float32) for k, shape in shapes.items()}
    votes["d"] = votes["d"].astype(jnp.bfloat16)
    tx = majority_vote(AXIS)
    update = lambda v: tx.update(v, MajorityVoteState(jnp.int32(2)))[0]  # noqa: E731
    got = jax.vmap(update, axis_name=AXIS)(votes)
    for name, votes_ in votes.items():
        assert got[name].dtype == votes_.dtype
        expected = counted(votes_.reshape(5, -1), 2).reshape(shapes[name])
        np.testing.assert_array_equal(got[name][3].astype(np.float32), expected)


def test_an_empty_tree_and_what_cannot_vote():
    tx = majority_vote(AXIS)
    assert tx.update({}, tx.init({}))[0] == {}
    with pytest.raises(TypeError, match="steps is int32"):
        tx.init({"steps": jnp.arange(3)})
    with pytest.raises(TypeError, match="update w is complex64"):
        tx.update({"w": jnp.ones(2, jnp.complex64)}, tx.init({"w": jnp.ones(2)}))


# --- on virtual devices ---


def on_devices(tx, voters, params):
    """Returns step and state of a training step in which every device has gradients of its own."""
    mesh = Mesh(np.array(jax.devices()[:voters]), (AXIS,))
    state = spread(tx.init(params), voters)
    specs = partition_specs(state, AXIS)

    def step(params, state, grads):
        grads = jax.tree.map(lambda g: g[0], grads)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    mapped = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(PartitionSpec(), specs, PartitionSpec(AXIS)),
        out_specs=(PartitionSpec(), specs),
        check_vma=False,
    )
    return jax.jit(mapped), state


def draw(seed, *lead):
    rng = np.random.default_rng(seed)
    shapes = {"kernel": (6, 5), "table": (9, 4)}
    return {k: rng.normal(size=(*lead, *s)).astype(np.float32) for k, s in shapes.items()}


@pytest.mark.slow  # seconds of compiling
@pytest.mark.parametrize("voters", [1, 3, 4, 8])
def test_training_steps_against_numpy(voters):
    """Six steps of the equations at the top of the file, in float64; some rows are never seen."""
    lr, b1, b2, wd = 0.1, 0.9, 0.99, 0.01
    tx = distributed_lion(lr, AXIS, b1, b2, weight_decay=wd)
    step, state = on_devices(tx, voters, params := draw(0))
    want = {k: p.astype(np.float64) for k, p in params.items()}
    momenta = {k: np.zeros((voters, *p.shape)) for k, p in want.items()}
    for t in range(6):
        grads = draw(t + 1, voters)
        grads["table"][:, 5:] = 0  # by nobody
        grads["table"][: voters // 2, 3] = 0  # by some
        params, state = step(params, state, grads)
        for k, g in grads.items():
            c = b1 * momenta[k] + (1 - b1) * g
            momenta[k] = b2 * momenta[k] + (1 - b2) * g
            d = counted(c.reshape(voters, -1), t % voters).reshape(want[k].shape)
            want[k] = want[k] - lr * (d + wd * want[k])
    chex.assert_trees_all_close(params, want, rtol=1e-5, atol=1e-6)
    mu = state[0].rows.mu
    chex.assert_trees_all_close(mu, momenta, rtol=1e-4, atol=1e-6)
    if voters > 1:
        assert np.abs(np.diff(mu["kernel"], axis=0)).max() > 1e-3
        assert {x.sharding.spec for x in jax.tree.leaves(mu)} == {PartitionSpec(AXIS)}


@pytest.mark.parametrize("voters", [1, 8])
def test_with_equal_gradients_it_is_lion_to_the_bit(voters):
    step, state = on_devices(distributed_lion(0.1, AXIS), voters, a := draw(0))
    tx = lion(0.1)
    b, other = draw(0), tx.init(draw(0))
    plain = jax.jit(lambda g, s, p: tx.update(g, s, p))
    for t in range(4):
        grads = draw(t + 1)
        a, state = step(a, state, jax.tree.map(lambda g: np.stack([g] * voters), grads))
        updates, other = plain(grads, other, b)
        b = optax.apply_updates(b, updates)
    chex.assert_trees_all_equal(a, b)


@pytest.mark.slow  # seconds of compiling
def test_rows_that_no_device_has_seen_stay_and_lazy_rows_go_on_staying():
    """Plain Lion moves a row for ever once it was seen; a lazy one moves only where it is seen."""
    sparse = {"kernel": False, "table": True}
    lazy = optax.chain(
        per_device_state(lazy_rows(scale_by_lion(), sparse)), majority_vote(AXIS), optax.scale(-0.1)
    )
    moved = {}
    for name, tx in {"lazy": lazy, "plain": distributed_lion(0.1, AXIS, weight_decay=0.0)}.items():
        step, state = on_devices(tx, 4, params := draw(0))
        seen = draw(1, 4)
        seen["table"][:, 5:] = 0
        seen["table"][1:, 2] = 0  # by the first device only
        params, state = step(params, state, seen)
        first = np.abs(params["table"] - draw(0)["table"]).max(1)
        params, _ = step(params, state, jax.tree.map(np.zeros_like, seen))
        moved[name] = first, np.abs(params["table"] - draw(0)["table"]).max(1)
    for first, _ in moved.values():
        np.testing.assert_allclose(first, [0.1] * 5 + [0] * 4, rtol=1e-5)
    np.testing.assert_allclose(moved["lazy"][1], moved["lazy"][0])
    np.testing.assert_allclose(moved["plain"][1], [0.2] * 5 + [0] * 4, rtol=1e-5)


@pytest.mark.slow  # seconds of compiling
def test_microbatches_are_accumulated_before_the_vote():
    """As `distributed_lion` says; a device without a finite microbatch keeps its momentum."""
    k, voters, lr, wd = 3, 4, 0.1, 0.01
    rest = [majority_vote(AXIS), optax.add_decayed_weights(wd), optax.scale(-lr)]
    tx = optax.chain(
        per_device_state(accumulate(scale_by_lion(), k)), emit_every(k, optax.chain(*rest))
    )
    step, state = on_devices(tx, voters, params := draw(0))
    want = {name: p.astype(np.float64) for name, p in params.items()}
    momenta = {name: np.zeros((voters, *p.shape)) for name, p in want.items()}
    for window in range(3):
        micro = [draw(10 * window + i, voters) for i in range(k)]
        micro[1]["kernel"][2] = np.nan
        if window == 1:
            for g in micro:
                g["table"][0, 0] = np.nan  # the first device has nothing to say
        for g in micro:
            params, state = step(params, state, g)
        good = np.array([[np.isfinite(g["kernel"][d]).all() and np.isfinite(g["table"][d]).all()
                          for d in range(voters)] for g in micro])  # fmt: skip
        for name in want:
            total = np.zeros_like(momenta[name])
            for g, ok in zip(micro, good, strict=True):
                total[ok] += g[name][ok]
            some = good.any(0).reshape(-1, 1, 1)
            mean = total / np.maximum(good.sum(0), 1).reshape(-1, 1, 1)
            c = np.where(some, 0.9 * momenta[name] + 0.1 * mean, 0)
            momenta[name] = np.where(some, 0.99 * momenta[name] + 0.01 * mean, momenta[name])
            d = counted(c.reshape(voters, -1), window % voters).reshape(want[name].shape)
            want[name] = want[name] - lr * (d + wd * want[name])
    chex.assert_trees_all_close(params, want, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(state[0].rows.inner.mu, momenta, rtol=1e-4, atol=1e-6)


def test_what_must_not_stand_around_a_state_of_each_device():
    for tx in (distributed_lion(0.1, AXIS), per_device_state(scale_by_lion())):
        with pytest.raises(ValueError, match="lazy_rows must stand inside per_device_state"):
            lazy_rows(tx, {"kernel": False, "table": True}).init(draw(0))


def test_flax_can_write_the_state():
    state = distributed_lion(0.1, AXIS).init(draw(0))
    blank = jax.tree.map(lambda x: x + 1, state)
    restored = serialization.from_bytes(blank, serialization.to_bytes(state))
    chex.assert_trees_all_equal(restored, state)


def test_shard_map_that_checks_what_varies_is_refused():
    tx = majority_vote(AXIS)
    vote = jax.shard_map(
        lambda u: tx.update(u, tx.init(u))[0],
        mesh=Mesh(np.array(jax.devices()), (AXIS,)), in_specs=PartitionSpec(AXIS),
        out_specs=PartitionSpec(AXIS),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"needs jax.shard_map.*check_vma=False"):
        vote(jnp.ones(8))


def sent(hlo, wanted):
    """Bytes that one device hands to the collectives of this name in a compiled program."""
    total = 0
    for result in re.findall(rf"= (\(?[a-z].*?) {wanted}(?:-start)?\(", hlo):
        for dtype, shape in re.findall(r"([a-z]+\d+)\[([\d,]*)\]", result):
            n = int(np.prod([int(d) for d in shape.split(",") if d] or [1]))
            total += n * int(dtype.lstrip("usfib")) // 8
    return total


def test_one_bit_each_way():
    """Of the program itself: N / 8 bytes there and back, and the same again for abstentions."""
    n, voters = 2**16, 8
    tx = majority_vote(AXIS)
    mesh = Mesh(np.array(jax.devices()), (AXIS,))
    vote = jax.shard_map(
        lambda u: tx.update(u, tx.init(u))[0],
        mesh=mesh, in_specs=PartitionSpec(AXIS), out_specs=PartitionSpec(AXIS), check_vma=False,
    )  # fmt: skip
    hlo = jax.jit(vote).lower(jnp.ones(n * voters)).compile().as_text()
    # Once for the signs of those who all vote, twice for signs and presence in the other branch.
    assert sent(hlo, "all-to-all") == 3 * n // 8
    assert sent(hlo, "all-gather") == 3 * n // 8
    assert sent(hlo, "all-reduce") == 4
    mean = jax.shard_map(
        lambda u: jax.lax.pmean(u, AXIS),
        mesh=mesh, in_specs=PartitionSpec(AXIS), out_specs=PartitionSpec(),
    )  # fmt: skip
    assert (
        sent(jax.jit(mean).lower(jnp.ones(n * voters)).compile().as_text(), "all-reduce") == 4 * n
    )


def test_the_state_is_one_row_for_each_device():
    tx = distributed_lion(0.1, AXIS)
    state = tx.init(params := draw(0))
    assert isinstance(state[0], PerDevice)
    assert state[0].rows.mu["kernel"].shape == (1, 6, 5)
    with pytest.raises(ValueError, match="must see 1 row of its state, but sees 4"):
        tx.update(draw(1), spread(state, 4), params)
    with pytest.raises(ValueError, match=r"one row, got shape \(4, 1"):
        spread(PerDevice(jnp.zeros((4, 1))), 8)
    with pytest.raises(ValueError, match="one row, got shape"):
        spread(PerDevice(jnp.zeros(())), 8)
    with pytest.raises(ValueError, match="weight_decay is -1"):
        distributed_lion(0.1, AXIS, weight_decay=-1)
    with pytest.raises(ValueError, match="b1"):
        distributed_lion(0.1, AXIS, b1=1.5)
    with pytest.raises(TypeError, match=r"axis_name must be a name .* got 0.9"):
        distributed_lion(0.1, 0.9, 0.99)  # pyright: ignore
