"""Checkpoints of one mesh restored on another: the same bits, where asked, and training goes on."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from blogjax.data.batches import Batches, EvaluationBatches
from blogjax.tasks.gradient import LossOutput, gradient_task
from blogjax.train import mesh as meshes
from blogjax.train.checkpoint import Checkpoints
from blogjax.train.loop import fit
from blogjax.train.reporting import read_metrics
from blogjax.train.state import abstract_state

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

slow = functools.partial(pytest.param, marks=pytest.mark.slow)
MESHES = {"1": (1, 1), "8": (8, 1), "2x4": (2, 4), "1x2": (1, 2)}
NAMES = ["1", "8", "2x4", slow("1x2")]
RNG = np.random.default_rng(0)
ARRAYS = {
    "x": RNG.normal(size=(48, 64)).astype(np.float32),
    "y": RNG.normal(size=(48, 3)).astype(np.float32),
}
BATCHES, EVALUATION = Batches(ARRAYS, 16, seed=1), EvaluationBatches(ARRAYS, 16)


def mesh_of(name):
    data, fsdp = MESHES[name]
    return meshes.make_mesh(data, fsdp, devices=jax.devices()[: data * fsdp])


def make_task(tx):
    """Two layers, the first of which is large enough to be split, and an average of them."""

    def init(key):
        first, last = jax.random.split(key)
        return {
            "params": {
                "hidden": {"kernel": jax.random.normal(first, (64, 128)) / 8},
                "head": {"kernel": jax.random.normal(last, (128, 3)) / 11, "bias": jnp.zeros(3)},
            }
        }

    def errors(params, batch):
        out = jnp.tanh(batch["x"] @ params["hidden"]["kernel"]) @ params["head"]["kernel"]
        return jnp.sum(jnp.square(out + params["head"]["bias"][None] - batch["y"]), axis=1)

    return gradient_task(
        init,
        lambda params, model_state, batch, key: LossOutput(errors(params, batch)),
        tx,
        ema_decay=0.9,
        evaluate=lambda params, model_state, batch, key: {"loss": errors(params, batch)},
    )


ADAM, SGD = make_task(optax.adam(0.01)), make_task(optax.sgd(0.01, momentum=0.9))


@functools.cache
def trained(name):
    return fit(ADAM, BATCHES, 3, mesh=mesh_of(name))


@pytest.fixture(scope="module", params=NAMES)
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    checkpoints = Checkpoints(folder, warn=pytest.fail)
    checkpoints.save(3, trained(request.param))
    checkpoints.wait()
    yield request.param, checkpoints
    checkpoints.close()


@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits_on_any_mesh_where_they_were_asked_for(saved, name):
    source, checkpoints = saved
    abstract = abstract_state(ADAM, mesh_of(name))
    step, state = checkpoints.restore(abstract)
    assert step == 3
    chex.assert_trees_all_equal(jax.device_get(state), jax.device_get(trained(source)))
    data, fsdp = MESHES[name]
    adam = state.opt_state.inner[0]
    for tree in (state.params, adam.mu, adam.nu, state.ema):
        kernel = tree["hidden"]["kernel"]
        assert kernel.sharding.spec == (P(None, "fsdp") if fsdp > 1 else P())
        assert {s.data.shape for s in kernel.addressable_shards} == {(64, 128 // fsdp)}
        assert len(kernel.addressable_shards) == data * fsdp
        assert tree["head"]["kernel"].sharding.is_fully_replicated
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert leaf.sharding == wanted.sharding


@functools.cache
def uninterrupted(folder):
    state = fit(
        SGD, BATCHES, 6, mesh=mesh_of("1"), workdir=folder, evaluation=EVALUATION, evaluate_every=3
    )
    return jax.device_get(state)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    uninterrupted(folder)
    return folder


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("8", "1"),
        ("1", "2x4"),
        slow("1", "8"),
        slow("8", "2x4"),
        slow("2x4", "8"),
        slow("2x4", "1x2"),
        slow("1x2", "1"),
    ],
)
def test_training_goes_on_as_if_nothing_had_changed(first, then, tmp_path, whole):
    """SGD with momentum: Adam would hide a wrong scale of the gradients."""
    options = {"workdir": tmp_path, "evaluation": EVALUATION, "evaluate_every": 3}
    fit(SGD, BATCHES, 3, mesh=mesh_of(first), **options)
    state = fit(SGD, BATCHES, 6, mesh=mesh_of(then), **options)
    assert {len(x.sharding.device_set) for x in jax.tree.leaves(state)} == {mesh_of(then).size}
    for kind, steps in {"train": [1, 2, 3, 4, 5, 6], "evaluate": [3, 6]}.items():
        here, there = (read_metrics(f / "metrics.jsonl", kind) for f in (tmp_path, whole))
        assert here["step"].tolist() == there["step"].tolist() == steps
        np.testing.assert_allclose(here["loss"], there["loss"], rtol=1e-6)
    reference = uninterrupted(whole)
    for tree in ("params", "ema", "opt_state"):
        chex.assert_trees_all_close(
            jax.device_get(getattr(state, tree)), getattr(reference, tree), rtol=1e-5, atol=1e-6
        )
