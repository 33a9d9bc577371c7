"""What the multi-task task refuses, and the combiners by name."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from blogjax.multitask.loss_weighting import WeightedLoss, inverse_loss
from blogjax.multitask.registry import COMBINERS, named_combiner
from blogjax.tasks.multitask import MultitaskOutput, multitask_task


def start(key):
    return {"params": {"w": jnp.ones(2)}}


BATCH = {"weight": jnp.ones(2), "row": jnp.arange(2)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": ("a", "a")}, r"names must be different.*\['a', 'a'\]"),
        ({"names": ()}, r"at least one, got \[\]"),
        ({"names": "ab"}, r"sequence of names, one for each task, got 'ab'"),
        ({"names": ("a", 2)}, r"sequence of names.*\('a', 2\)"),
        (
            {"combiner": "min_norm", "weighting": inverse_loss},
            "a combiner or a weighting, got both",
        ),
        ({"combiner": "max_norm"}, r"'max_norm' is unknown; valid: min_norm, .*upgrad"),
        ({"mode": "map"}, r"mode is 'map', but must be one of jacrev, scan"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\)"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        multitask_task(start, lambda *_: None, optax.sgd(0.1), **{"names": ("a", "b"), **change})


@pytest.mark.parametrize(
    ("losses", "options", "message"),
    [
        (jnp.ones((2, 3)), {}, r"\(2, 2\) for the tasks p, q, got shape \(2, 3\)"),
        (jnp.ones(2), {}, r"one number per example and task, \(2, 2\).*got shape \(2,\)"),
        (jnp.ones((1, 2)), {}, r"got shape \(1, 2\)"),
        (jnp.ones((2, 2), jnp.int32), {}, r"real numbers, got int32"),
        ((jnp.ones((2, 2)), jnp.ones(2)), {}, r"weights of shape \(2,\) for losses of shape"),
        (
            (jnp.ones((2, 2)), None, {"weight/p": jnp.ones(2)}),
            {},
            r"may not be called \['weight/p'\]",
        ),
        (
            (jnp.ones((2, 2)), None, {"v": (jnp.ones(2), jnp.ones(1))}),
            {},
            r"weights of shape \(1,\) for rows of shape \(2,\)",
        ),
        (
            jnp.ones((2, 2)),
            {"weighting": lambda losses: WeightedLoss(losses, losses)},
            r"a scalar and weights of shape \(2,\), got shapes \(2,\) and \(2,\)",
        ),
        (jnp.ones((2, 2)), {"combiner": "min_norm", "shared": {"v": True}}, "v|key"),
    ],
)  # fmt: skip
def test_bad_losses_are_refused(losses, options, message):
    parts = losses if isinstance(losses, tuple) else (losses,)
    output = lambda params, ms, batch, key: MultitaskOutput(*parts)  # noqa: E731
    task = multitask_task(start, output, optax.sgd(1.0), names=("p", "q"), **options)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(task.step, task.init(jax.random.key(0)), BATCH, jax.random.key(0))


@pytest.mark.parametrize("name", COMBINERS)
def test_every_name_is_its_combiner(name):
    """Two orthogonal gradients, where each method has a closed form."""
    weights = named_combiner(name)(jnp.diag(jnp.array([1.0, 4.0])))
    # CAGrad: (1 + c |g| / |g|) / 2 on the task with the smaller product, c = 1/2.
    wanted = {
        "min_norm": [0.8, 0.2], "gradient_normalized": [1, 0.5], "primary_auxiliary": [1, 0],
        "pcgrad": [1, 1], "upgrad": [0.5, 0.5],
    }  # fmt: skip
    if name in wanted:
        np.testing.assert_allclose(weights, wanted[name], rtol=1e-6, atol=1e-7)
    else:
        assert weights.shape == (2,)
